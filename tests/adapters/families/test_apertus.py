"""Apertus against transformers, in every variant."""

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config, load_apart

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {},
    "tied, biases, head size": {
        "attention_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "another activation": {"hidden_act": "silu", "num_key_value_heads": 4},
}
_APERTUS_8B = {
    "architectures": ["ApertusForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "xielu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "apertus",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 3,
    "post_norm": False,
    "qk_norm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
        "type": "llama3",
    },
    "rope_theta": 12000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.0.dev0",
    "use_cache": True,
    "vocab_size": 131072,
}
PUBLISHED = {
    "Apertus-8B-2509": (_APERTUS_8B, 8_053_338_176),
    "Apertus-8B-Instruct-2509": ({**_APERTUS_8B, "eos_token_id": 68}, 8_053_338_176),
    "Apertus-70B-2509": (
        {
            **_APERTUS_8B,
            "hidden_size": 8192,
            "intermediate_size": 43008,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
        },
        70_599_864_480,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "apertus", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "apertus", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize("more", [{}, {"rope_theta": 3000.0}])
def test_silent_config(more, tmp_path) -> None:
    """Where there is no object for the rotation it is Llama 3.1's, whatever a base beside it says."""
    folder = save(tmp_path, "apertus", **{**TINY, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=gone, **more)).cfg
    assert (cfg.act_fn, cfg.positions.base, cfg.positions.scaling.kind) == ("xielu", 1.2e7, "llama3")


def test_constants_of_the_activation(tmp_path) -> None:
    """transformers makes up constants that a file lacks, so they are written; others than ours are refused."""
    folder = save(tmp_path, "apertus", **TINY)
    model = HookedCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    tensors = load_apart(tmp_path / "bfloat16" / "model.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith((".beta", ".eps"))}
    assert len(found) == 2 * 3
    assert all(tensor.dtype == torch.bfloat16 and tensor.shape == () for tensor in found.values())
    check_reading(tmp_path / "bfloat16")

    tensors["model.layers.1.mlp.act_fn.beta"] = torch.tensor(0.75, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "bfloat16" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"beta' holds 0.75; expected 0.5"):
        HookedCausalLM.from_pretrained(tmp_path / "bfloat16")


@pytest.mark.parametrize("changes", [{"qk_norm": False}, {"post_norm": True}, {"mlp_bias": True}])
def test_notes_that_describe_another_network_are_refused(changes, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "apertus", **TINY), **changes)
    with pytest.raises(UnsupportedModelError, match="the only value implemented"):
        open_checkpoint(folder)
