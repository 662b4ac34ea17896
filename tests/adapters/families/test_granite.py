"""Granite against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

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
    "factors, tied": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "biases, head size": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.3,
        "logits_scaling": 3,
        "embedding_multiplier": 5,
        "head_dim": 12,
    },
}
_GRANITE_2B = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 49155,
}
PUBLISHED = {
    "granite-3.1-2b-base": (_GRANITE_2B, 2_533_531_648),
    "granite-3.0-2b-base": (
        {
            **{key: value for key, value in _GRANITE_2B.items() if key != "torch_dtype"},
            "max_position_embeddings": 4096,
            "rope_theta": 10000,
            "transformers_version": "4.45.0.dev0",
            "vocab_size": 49152,
        },
        2_533_525_504,
    ),
    "granite-3.2-8b-instruct": (
        {
            **_GRANITE_2B,
            "attention_multiplier": 0.0078125,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "logits_scaling": 16.0,
            "rope_theta": 10000000.0,
            "transformers_version": "4.47.0",
        },
        8_170_848_256,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "granite", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "granite", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    """An absent factor is 1, that on scores, too."""
    folder = save(tmp_path, "granite", **{**TINY, "num_key_value_heads": 4})
    gone = ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "rms_norm_eps"]
    cfg = check_reading(edit_config(folder, remove=[*gone, "num_key_value_heads", "rope_parameters"])).cfg
    assert (cfg.embed_scale, cfg.residual_scale, cfg.attn_scale, cfg.logits_scale) == (None, 1.0, 1.0, 1.0)
