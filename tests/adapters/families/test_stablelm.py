"""StableLM against transformers, in every variant."""

import pytest

from hooklens.config import RotaryPositions
from hooklens.errors import UnsupportedModelError
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
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "no biases (3B)": {"num_key_value_heads": 4},
    "biases of queries, keys and values (2-1.6B)": {
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    },
    "parallel, norms per head (2-12B)": {"use_parallel_residual": True, "qk_layernorm": True, "layer_norm_eps": 0.0001},
    "sequential, norms per head, tied": {"qk_layernorm": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
}
PUBLISHED = {
    "stablelm-3b-4e1t": (
        {
            "architectures": ["StableLmForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 6912,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
            "model_type": "stablelm",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0",
            "use_cache": True,
            "use_qkv_bias": False,
            "vocab_size": 50304,
        },
        2_795_443_200,
    ),
    "stablelm-2-1_6b": (
        {
            "architectures": ["StableLmForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 100257,
            "eos_token_id": 100257,
            "hidden_act": "silu",
            "hidden_dropout": 0.0,
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 5632,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
            "model_type": "stablelm",
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0",
            "use_cache": True,
            "use_qkv_bias": True,
            "vocab_size": 100352,
        },
        1_644_515_328,
    ),
    "stablelm-2-12b": (
        {
            "architectures": ["StableLmForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 100257,
            "eos_token_id": 100257,
            "hidden_act": "silu",
            "hidden_dropout": 0.0,
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 13824,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
            "model_type": "stablelm",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.25,
            "qk_layernorm": True,
            "rope_scaling": None,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0",
            "use_cache": True,
            "use_parallel_residual": True,
            "use_qkv_bias": False,
            "vocab_size": 100352,
        },
        12_143_185_920,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "stablelm", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "stablelm", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("stablelm", **TINY)


def test_quarter_of_each_head_turns_where_the_config_is_silent() -> None:
    config = {"model_type": "stablelm", **TINY}
    for rope in ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}):
        assert read_config({**config, **rope}).positions == RotaryPositions(dim=4)


def test_key_value_heads_are_asked_for() -> None:
    """transformers takes 32, the number of one checkpoint, where the key is absent."""
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads is missing"):
        read_config({"model_type": "stablelm", **{key: value for key, value in TINY.items() if "key" not in key}})
