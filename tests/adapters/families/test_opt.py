"""OPT against transformers, in every variant."""

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import load_apart

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 56,
    "max_position_embeddings": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu"},
    "no biases": {"enable_bias": False},
    "norms without weights": {"layer_norm_elementwise_affine": False, "enable_bias": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "norms of the stream": {"do_layer_norm_before": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "350m untied": {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "tie_word_embeddings": False},
    "narrow embedding": {"word_embed_proj_dim": 20},
}
SMALL = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
PUBLISHED = {
    "opt-125m": (SMALL, 125_239_296),
    "opt-350m": (
        {
            **SMALL,
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "word_embed_proj_dim": 512,
        },
        331_196_416,
    ),
    "opt-1.3b": (
        {
            **SMALL,
            "ffn_dim": 8192,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "word_embed_proj_dim": 2048,
        },
        1_315_758_080,
    ),
    "opt-6.7b": (
        {
            **SMALL,
            "ffn_dim": 16384,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "word_embed_proj_dim": 4096,
        },
        6_658_473_984,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "opt", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "opt", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize("variant", ["tied", "350m"])
def test_files_of_the_base_model_are_read(variant: str, tmp_path) -> None:
    """Meta's files: names begin with `decoder.`."""
    folder = save(tmp_path, "opt", **{**TINY, **VARIANTS[variant]})
    expected = dict(HookedCausalLM.from_pretrained(folder).state_dict())
    tensors = load_apart(folder / "model.safetensors")
    base = {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}
    save_file(base, folder / "model.safetensors")
    found = HookedCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
