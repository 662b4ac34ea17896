"""Nemotron-4 and Minitron against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, check_defaults, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "biases, head size": {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "norm_eps": 0.0001},
    "tied, quarter of each head": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.25},
    },
}
PUBLISHED = {
    "Minitron-4B-Base": (
        {
            "architectures": ["NemotronForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "hidden_act": "relu2",
            "hidden_size": 3072,
            "initializer_range": 0.0134,
            "intermediate_size": 9216,
            "kv_channels": 128,
            "max_position_embeddings": 4096,
            "model_type": "nemotron",
            "norm_eps": 1e-05,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": True,
            "vocab_size": 256000,
        },
        4_190_509_056,
    ),
    "Nemotron-4-Mini-Hindi-4B-Instruct": (
        {
            "_name_or_path": "nvidia/nemotron-4-mini-hindi-4b-instruct",
            "architectures": ["NemotronForCausalLM"],
            "bos_token_id": 2,
            "eos_token_id": 5,
            "hidden_act": "relu2",
            "hidden_size": 3072,
            "initializer_range": 0.0134,
            "intermediate_size": 9216,
            "kv_channels": 128,
            "max_position_embeddings": 4096,
            "model_type": "nemotron",
            "norm_eps": 1e-05,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": True,
            "vocab_size": 256000,
        },
        4_190_509_056,
    ),
    "Minitron-8B-Base": (
        {
            "architectures": ["NemotronForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "head_dim": 128,
            "hidden_act": "relu2",
            "hidden_size": 4096,
            "initializer_range": 0.0134,
            "intermediate_size": 16384,
            "kv_channels": 128,
            "max_position_embeddings": 4096,
            "model_type": "nemotron",
            "norm_eps": 1e-05,
            "num_attention_heads": 48,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": True,
            "vocab_size": 256000,
        },
        8_271_699_968,
    ),
    "Nemotron-4-340B-Base": (
        {
            "architectures": ["NemotronForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "head_dim": 192,
            "hidden_act": "relu2",
            "hidden_size": 18432,
            "initializer_range": 0.0134,
            "intermediate_size": 73728,
            "kv_channels": 128,
            "max_position_embeddings": 4096,
            "model_type": "nemotron",
            "norm_eps": 1e-05,
            "num_attention_heads": 96,
            "num_hidden_layers": 96,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": True,
            "vocab_size": 256000,
        },
        341_029_195_776,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "nemotron", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "nemotron", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("nemotron", **TINY)
