"""Helium against transformers, in every variant."""

import pytest

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
}
VARIANTS = {
    "plain": {"head_dim": 8},
    "biases": {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.0001},
    "tied, all heads with keys": {
        "head_dim": 16,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
# The later Helium models are written as Llama.
PUBLISHED = {
    "helium-1-preview-2b": (
        {
            "architectures": ["HeliumForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 7040,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "model_type": "helium",
            "num_attention_heads": 20,
            "num_hidden_layers": 24,
            "num_key_value_heads": 20,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-08,
            "rope_theta": 100000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 48000,
        },
        2_172_643_840,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "helium", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "helium", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("helium", **{**TINY, "head_dim": 8})


@pytest.mark.parametrize("given", [{}, {"head_dim": 12}])
def test_heads_that_do_not_fill_the_stream_are_refused(given) -> None:
    """The output map is as wide as the stream on both sides; a silent config has heads of 128."""
    with pytest.raises(UnsupportedModelError, match="expected hidden_size / num_attention_heads = 32 / 4"):
        read_config({"model_type": "helium", **TINY, **given})
