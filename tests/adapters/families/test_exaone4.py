"""EXAONE 4 against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import NoPositions, RotaryPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {"num_hidden_layers": 5},
    "no window, tied, head size": {
        "sliding_window": None,
        "layer_types": [FULL] * 3,
        "tie_word_embeddings": True,
        "head_dim": 12,
    },
    "first layer sees all, scaled rotary": {
        "layer_types": [FULL, SLIDING, FULL],
        "num_key_value_heads": 4,
        "rope_parameters": {**ROPE, "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    },
}
_EXAONE_32B = {
    "architectures": ["Exaone4ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27392,
    "layer_types": ([SLIDING] * 3 + [FULL]) * 16,
    "max_position_embeddings": 131072,
    "model_type": "exaone4",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**ROPE, "factor": 16.0, "original_max_position_embeddings": 8192},
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "vocab_size": 102400,
}
PUBLISHED = {
    "EXAONE-4.0-32B": (_EXAONE_32B, 32_003_216_384),
    "EXAONE-4.0-32B, before layer_types": (
        {
            **{key: value for key, value in _EXAONE_32B.items() if key != "layer_types"},
            "sliding_window_pattern": 4,
        },
        32_003_216_384,
    ),
    "EXAONE-4.0-1.2B": (
        {
            **_EXAONE_32B,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 4096,
            "layer_types": [FULL] * 30,
            "max_position_embeddings": 65536,
            "num_attention_heads": 32,
            "num_hidden_layers": 30,
            "rope_scaling": {**ROPE, "factor": 16.0, "original_max_position_embeddings": 8192},
            "sliding_window": None,
            "sliding_window_pattern": None,
            "tie_word_embeddings": True,
        },
        1_279_391_488,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "exaone4", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "exaone4", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "exaone4", **{**TINY, "num_hidden_layers": 4})
    gone = ["layer_types", "sliding_window", "sliding_window_pattern", "rope_parameters", "rms_norm_eps"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.windows, cfg.norm.eps) == ((4096, 4096, 4096, None), 1e-5)
    assert [isinstance(one, NoPositions) for one in cfg.positions] == [False, False, False, True]


@pytest.mark.parametrize("pattern", [2, None])
def test_no_window_rotates_all_layers(pattern, tmp_path) -> None:
    """transformers cannot read such a config without `layer_types`."""
    folder = save(tmp_path, "exaone4", **TINY)
    edit_config(folder, remove=["layer_types"], sliding_window=None, sliding_window_pattern=pattern)
    cfg = open_checkpoint(folder).cfg
    assert cfg.windows is None
    assert cfg.positions == RotaryPositions(dim=8)


def test_pattern_in_letters_needs_layer_types(tmp_path) -> None:
    folder = edit_config(save(tmp_path, "exaone4", **TINY), sliding_window_pattern="LG")
    check_reading(folder)
    with pytest.raises(UnsupportedModelError, match="sliding_window_pattern is 'LG'; expected int"):
        open_checkpoint(edit_config(folder, remove=["layer_types"]))
