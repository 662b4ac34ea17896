"""Ministral against transformers, in every variant."""

import json
import warnings

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import (
    D_VOCAB,
    cases,
    check,
    check_defaults,
    check_reading,
    read_config,
    read_published,
    save,
    verify_folder,
)
from tests.checkpoints import edit_config

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
    "all layers slide": {"sliding_window": 6},
    "kinds of layers": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_key_value_heads": 4,
    },
    "no layer slides, tied": {
        "layer_types": ["full_attention", "full_attention", "full_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
# There are no others. It is told from Mistral by its `layer_types`.
PUBLISHED = {
    "Ministral-8B-Instruct-2410": (
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 9,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.46.0.dev0",
            "use_cache": True,
            "vocab_size": 131072,
        },
        8_019_808_256,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "ministral", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "ministral", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("ministral", **TINY)


@pytest.mark.parametrize(
    ("given", "windows"),
    [({}, (4096,) * 3), ({"sliding_window": None}, None), ({"sliding_window": 5}, (5,) * 3)],
)
def test_window_where_the_config_is_silent_or_says_null(given, windows) -> None:
    assert read_config({"model_type": "ministral", **TINY, **given}).windows == windows


def test_head_size_where_the_config_says_null() -> None:
    """transformers cannot build that; the size is what it means elsewhere."""
    assert read_config({"model_type": "ministral", **TINY, "head_dim": None}).d_head == 8


def test_mistral_with_types_of_layers_is_ministral(tmp_path) -> None:
    """The published config names Mistral's type; `layer_types` was warned of, and all layers had the window."""
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    folder = save(tmp_path, "ministral", **TINY, sliding_window=5, layer_types=types)
    edit_config(folder, model_type="mistral", architectures=["MistralForCausalLM"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = check_reading(folder)
    assert model.cfg.windows == (None, 5, 5)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "ministral"
    assert open_checkpoint(tmp_path / "saved").cfg == model.cfg
    edit_config(folder, architectures=["MistralForSequenceClassification"])
    with pytest.raises(UnsupportedModelError, match="MistralForSequenceClassification"):
        open_checkpoint(folder)
