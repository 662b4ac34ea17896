"""Ministral 3 against transformers, in every variant."""

import pytest
from transformers import AutoConfig

from hooklens.adapters.families import load_families
from hooklens.config import QueryTemperature, RotaryPositions
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
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "head_dim": 12,
}
VARIANTS = {
    "temperature": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "temperature without stretch, window": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "llama_4_scaling_beta": 0.4,
            "original_max_position_embeddings": 5,
        },
        "sliding_window": 7,
    },
    "no temperature, tied": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.0,
        },
        "tie_word_embeddings": True,
    },
    "default rotation": {"num_key_value_heads": 4},
}
PUBLISHED = {
    "Ministral-3-3B": (
        {
            "architectures": ["Ministral3ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 9216,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 26,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
            },
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "5.0.0.dev0",
            "use_cache": True,
            "vocab_size": 131072,
        },
        3_429_006_336,
    ),
    "Ministral-3-8B": (
        {
            "architectures": ["Ministral3ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "5.0.0.dev0",
            "use_cache": True,
            "vocab_size": 131072,
        },
        8_489_553_920,
    ),
    "Ministral-3-14B": (
        {
            "architectures": ["Ministral3ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 16384,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "rope_theta": 1000000000.0,
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "5.0.0.dev0",
            "use_cache": True,
            "vocab_size": 131072,
        },
        13_506_073_600,
    ),
    "Devstral-2-123B": (
        {
            "architectures": ["Ministral3ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 12288,
            "initializer_range": 0.02,
            "intermediate_size": 28672,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 96,
            "num_hidden_layers": 88,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.0,
                "llama_4_scaling_beta": 0.0,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 64.0,
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "5.0.0.dev0",
            "use_cache": True,
            "vocab_size": 131072,
        },
        125_025_988_608,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "ministral3", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "ministral3", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("ministral3", **TINY)


def test_flat_base_counts_for_nothing_without_a_description_of_the_rotation() -> None:
    """transformers then takes its own description whole, stretched 16 times."""
    config = {"model_type": "ministral3", **TINY}
    cfg = read_config({**config, "rope_theta": 777.0})
    assert cfg == read_config(config)
    assert cfg == read_config(AutoConfig.for_model(**config, rope_theta=777.0).to_dict())
    assert isinstance(cfg.positions, RotaryPositions)
    assert cfg.positions.base == 1e6
    assert cfg.query_temperature == QueryTemperature(scale=0.1, length=16384)


def test_temperature_must_be_said_where_the_rotation_is_described() -> None:
    """transformers cannot run a config without it."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters\.llama_4_scaling_beta is missing"):
        read_config({"model_type": "ministral3", **TINY, "rope_parameters": rope})
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters\.original_max_position_embeddings is missing"):
        read_config({"model_type": "ministral3", **TINY, "rope_parameters": {**rope, "llama_4_scaling_beta": 0.1}})


def test_temperature_in_another_length_than_the_stretch_cannot_be_written() -> None:
    """Both are one key on disk."""
    cfg = read_config({"model_type": "ministral3", **TINY})
    family = next(family for family in load_families() if family.name == "ministral3")
    for length, expressible in ((16384, True), (16, False)):
        other = cfg.replace(query_temperature=QueryTemperature(scale=0.3, length=length), origin=None)
        assert (family.inexpressible_fields(other) == []) is expressible
