"""Persimmon against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, check_defaults, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "norms of queries and keys": {"layer_norm_eps": 0.0001},
    "no norms of queries and keys": {
        "qk_layernorm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.75},
    },
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"},
}
EIGHT = {
    "architectures": ["PersimmonForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 71013,
    "eos_token_id": 71013,
    "hidden_act": "relu2",
    "hidden_dropout": 0.6,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 16384,
    "model_type": "persimmon",
    "num_attention_heads": 64,
    "num_hidden_layers": 36,
    "num_key_value_heads": 64,
    "qk_layernorm": True,
    "rope_scaling": None,
    "rope_theta": 25000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PUBLISHED = {
    "persimmon-8b-base": (EIGHT, 9_397_175_296),
    "persimmon-8b-chat": (EIGHT, 9_397_175_296),
    "optimum-intel-internal-testing/tiny-random-PersimmonForCausalLM": (
        {
            "architectures": ["PersimmonForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 71013,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_dropout": 0.0,
            "hidden_size": 32,
            "intermediate_size": 37,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 512,
            "model_type": "persimmon",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
            "rope_scaling": None,
            "rope_theta": 25000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vocab_size": 262144,
        },
        16_790_922,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "persimmon", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "persimmon", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("persimmon", **TINY)
