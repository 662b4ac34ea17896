"""Olmo 3 against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "attention_factor": 1.2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
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
    "two rotations, tied, biases": {
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: {**YARN, "rope_theta": 3000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 200.0},
        },
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "no layer slides": {"layer_types": [FULL] * 3},
    "head size": {"head_dim": 12, "num_key_value_heads": 4, "layer_types": [FULL, SLIDING, FULL]},
}
_OLMO_3_7B = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ([SLIDING] * 3 + [FULL]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.57.0",
    "use_cache": False,
    "vocab_size": 100278,
}
PUBLISHED = {
    "Olmo-3-1025-7B": (_OLMO_3_7B, 7_298_011_136),
    "Olmo-3-7B-Instruct": (
        {key: value for key, value in _OLMO_3_7B.items() if key != "torch_dtype"} | {"dtype": "bfloat16"},
        7_298_011_136,
    ),
    "Olmo-3-1125-32B": (
        {
            **_OLMO_3_7B,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "layer_types": ([SLIDING] * 3 + [FULL]) * 16,
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
        },
        32_233_522_176,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "olmo3", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "olmo3", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "olmo3", **{**TINY, "num_hidden_layers": 4, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "layer_types", "sliding_window"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.windows, cfg.positions.base, cfg.norm.eps) == ((4096, 4096, 4096, None), 5e5, 1e-5)


@pytest.mark.parametrize(
    "scaling", [{}, {"rope_scaling": YARN}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}]
)
def test_old_spelling_is_that_of_layers_that_see_all(scaling, tmp_path) -> None:
    """Layers that slide take neither the scaling nor the base that stands beside it."""
    folder = save(tmp_path, "olmo3", **TINY, layer_types=[SLIDING, FULL, SLIDING])
    cfg = check_reading(edit_config(folder, remove=["rope_parameters"], rope_theta=3000.0, **scaling)).cfg
    assert [one.base for one in cfg.positions] == [5e5, 3000, 5e5]
    assert [one.scaling is None for one in cfg.positions] == [True, not scaling, True]


def test_one_new_object_for_both_kinds_is_refused(tmp_path) -> None:
    """transformers takes its defaults there."""
    rope = {"rope_type": "default", "rope_theta": 3000.0}
    folder = edit_config(save(tmp_path, "olmo3", **TINY), rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="an object for each of 'full_attention' and 'sliding_attention'"):
        open_checkpoint(folder)
