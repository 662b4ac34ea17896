"""StarCoder2 against transformers, in every variant."""

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
    "window": {"sliding_window": 6},
    "no biases, untied": {"use_bias": False, "tie_word_embeddings": False, "sliding_window": None},
    "all heads with keys": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "norm_epsilon": 0.0001,
    },
    "head size, untied": {"head_dim": 12, "tie_word_embeddings": False, "hidden_act": "relu"},
}
PUBLISHED = {
    "starcoder2-3b": (
        {
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "embedding_dropout": 0.1,
            "eos_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 3072,
            "initializer_range": 0.018042,
            "intermediate_size": 12288,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 24,
            "num_hidden_layers": 30,
            "num_key_value_heads": 2,
            "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.37.0.dev0",
            "use_bias": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
        3_030_371_328,
    ),
    "starcoder2-7b": (
        {
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "embedding_dropout": 0.1,
            "eos_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "initializer_range": 0.018042,
            "intermediate_size": 18432,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 36,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "residual_dropout": 0.1,
            "rope_theta": 1000000,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.37.0.dev0",
            "use_bias": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
        7_173_923_840,
    ),
    "starcoder2-15b": (
        {
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "embedding_dropout": 0.1,
            "eos_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 6144,
            "initializer_range": 0.01275,
            "intermediate_size": 24576,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 48,
            "num_hidden_layers": 40,
            "num_key_value_heads": 4,
            "residual_dropout": 0.1,
            "rope_theta": 100000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.37.0.dev0",
            "use_bias": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
        15_957_889_024,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "starcoder2", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "starcoder2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("starcoder2", **TINY)
