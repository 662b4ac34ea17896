"""Mistral against transformers, in every variant."""

import warnings

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_config, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "window": {"sliding_window": 6},
    "no window": {"sliding_window": None},
    "head size": {
        "head_dim": 12,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tied": {"tie_word_embeddings": True, "sliding_window": 5, "num_key_value_heads": 4},
}
FIRST = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LATER = {**FIRST, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}
PUBLISHED = {
    "Mistral-7B-v0.1": (FIRST, 7_241_732_096),
    "Mistral-7B-v0.2": ({**LATER, "transformers_version": "4.37.2"}, 7_241_732_096),
    "Mistral-Nemo-Base-2407": (
        {
            **LATER,
            "head_dim": 128,
            "hidden_size": 5120,
            "max_position_embeddings": 128000,
            "num_hidden_layers": 40,
            "transformers_version": "4.43.0.dev0",
            "vocab_size": 131072,
        },
        12_247_782_400,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "mistral", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "mistral", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize(
    ("given", "windows"), [({}, (4096,) * 3), ({"sliding_window": None}, None), ({"sliding_window": 5}, (5,) * 3)]
)
def test_window_where_the_config_is_silent_or_says_null(given, windows, tmp_path) -> None:
    """An absent key is the window of the first release, null is none."""
    folder = save(tmp_path, "mistral", **TINY)
    edit_config(folder, remove=["sliding_window"], **given)
    assert open_checkpoint(folder).cfg.windows == windows


def test_biases_that_llamas_keys_would_give_are_refused() -> None:
    """Merged checkpoints keep Llama's keys, and transformers builds no bias whatever they say."""
    config = {"model_type": "mistral", **TINY}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config({**config, "attention_bias": False, "mlp_bias": False}).qkv_bias is False
    with pytest.raises(UnsupportedModelError, match=r"attention_bias is True; expected False.*mlp_bias is True"):
        read_config({**config, "attention_bias": True, "mlp_bias": True})
