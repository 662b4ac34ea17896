"""SmolLM3 against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import NoPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

FULL, SLIDING = "full_attention", "sliding_attention"
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
    "plain": {"num_hidden_layers": 5},
    "flags, untied, biases": {
        "no_rope_layers": [0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "windows": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
    "windows by layer, head size": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL, SLIDING],
        "no_rope_layers": [1, 0, 0],
        "head_dim": 12,
    },
}
_SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": [FULL] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
# There are no others.
PUBLISHED = {
    "SmolLM3-3B": (_SMOLLM3_3B, 3_075_098_624),
    "SmolLM3-3B-Base": ({**_SMOLLM3_3B, "eos_token_id": 128001}, 3_075_098_624),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "smollm3", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "smollm3", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "smollm3", **{**TINY, "num_hidden_layers": 4})
    gone = ["no_rope_layers", "no_rope_layer_interval", "layer_types", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=[*gone, "use_sliding_window", "sliding_window"])).cfg
    assert [isinstance(one, NoPositions) for one in cfg.positions] == [False, False, False, True]
    assert (cfg.positions[0].base, cfg.windows, cfg.tied_unembed) == (2e6, None, True)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sliding_window": 6, "layer_types": [SLIDING, FULL, FULL]}, "use_sliding_window is False; expected true"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; expected at least 1"),
    ],
)
def test_contradictions_are_refused(changes, found, tmp_path) -> None:
    """Where windows are named and switched off, transformers attends with them or without, by its backend."""
    folder = edit_config(save(tmp_path, "smollm3", **TINY), **changes)
    with pytest.raises(UnsupportedModelError, match=found):
        open_checkpoint(folder)
