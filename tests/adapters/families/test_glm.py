"""GLM-4 against transformers, in every variant."""

import pytest

from hooklens.config import RotaryPositions
from tests.adapters.families.checks import (
    D_VOCAB,
    cases,
    check,
    check_defaults,
    read_config,
    read_published,
    save,
    verify_folder,
)

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "head_dim": 12,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}},
    "no biases, all of each head, tied": {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 1.0},
    },
    "all heads with keys": {"num_key_value_heads": 4, "head_dim": 8},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
        }
    },
}
PUBLISHED = {
    "glm-4-9b-hf": (
        {
            "architectures": ["GlmForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "max_position_embeddings": 8192,
            "model_type": "glm",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 151552,
        },
        9_399_951_360,
    ),
    "glm-4-9b-chat-1m-hf": (
        {
            "architectures": ["GlmForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "max_position_embeddings": 1048576,
            "model_type": "glm",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 4,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 100000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 151552,
        },
        9_483_857_920,
    ),
    "glm-edge-1.5b-chat": (
        {
            "architectures": ["GlmForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": [59246, 59253, 59255],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 8192,
            "model_type": "glm",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "pad_token_id": 59246,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 59264,
        },
        1_593_427_968,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "glm", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "glm", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("glm", **TINY)


def test_head_size_biases_and_fraction_where_the_config_is_silent() -> None:
    sizes = {key: value for key, value in TINY.items() if key != "head_dim"}
    cfg = read_config({"model_type": "glm", **sizes})
    assert (cfg.d_head, cfg.qkv_bias, cfg.out_bias) == (128, True, False)
    assert cfg.positions == RotaryPositions(dim=64, layout="interleaved")
