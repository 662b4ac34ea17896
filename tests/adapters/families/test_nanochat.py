"""nanochat against transformers, in every variant."""

import pytest
import torch

from hooklens import HookedCausalLM
from tests.adapters.families.checks import (
    D_VOCAB,
    batch,
    cases,
    check,
    check_reading,
    load_reference,
    read_published,
    save,
    verify_folder,
)
from tests.checkpoints import edit_config

ORIGINAL = "original_max_position_embeddings"
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
    "tied, biases, no cap": {
        "attention_bias": True,
        "tie_word_embeddings": True,
        "final_logit_softcapping": None,
        "num_key_value_heads": 4,
    },
    "head size, tight cap, scaled rotary": {
        "head_dim": 12,
        "final_logit_softcapping": 2.0,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0} | {ORIGINAL: 16},
    },
}
_NANOCHAT_D20 = {
    "architectures": ["NanoChatForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 65527,
    "dtype": "bfloat16",
    "eos_token_id": 65531,
    "final_logit_softcapping": 15.0,
    "hidden_act": "relu2",
    "hidden_size": 1280,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 2048,
    "model_type": "nanochat",
    "num_attention_heads": 10,
    "num_hidden_layers": 20,
    "num_key_value_heads": 10,
    "pad_token_id": 65531,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.0.0.dev0",
    "use_cache": True,
    "vocab_size": 65536,
}


def _of_depth(depth: int) -> dict:
    """The project's models are described by their number of layers."""
    sizes = {"hidden_size": 64 * depth, "intermediate_size": 256 * depth, "num_hidden_layers": depth}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), depth // 2)
    return {**sizes, **heads}


_BEFORE = {
    **{key: value for key, value in _NANOCHAT_D20.items() if key != "final_logit_softcapping"},
    "logits_soft_cap": 15.0,
}


PUBLISHED = {
    "nanochat-d20": ({**_BEFORE, "bos_token_id": 0}, 560_988_160),
    "nanochat-d32": ({**_BEFORE, **_of_depth(32)}, 1_879_048_192),
    "nanochat-d34": (
        {**_NANOCHAT_D20, **_of_depth(34), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        2_217_082_880,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "nanochat", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "nanochat", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    """An absent cap is that of every checkpoint, and null is none."""
    folder = save(tmp_path, "nanochat", **{**TINY, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "final_logit_softcapping"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.act_fn, cfg.logits_softcap, cfg.positions.reverse) == ("relu2", 15.0, True)


def test_queries_turn_as_in_transformers(tmp_path) -> None:
    """`hook_q` is the query of the checkpoint's own maps, and no permutation of it."""
    model = HookedCausalLM.from_pretrained(save(tmp_path, "nanochat", **TINY))
    reference, ids = load_reference(tmp_path, torch.float32), batch("right")[0][:1]
    found = {}
    projection = reference.model.layers[1].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, output: found.update(q=output.unflatten(-1, (4, 8))))
    with torch.no_grad():
        reference(ids, use_cache=False)
        _, cache = model.run_with_cache(ids)
    torch.testing.assert_close(cache["blocks.1.attn.hook_q"], found["q"], rtol=1e-4, atol=1e-5)
