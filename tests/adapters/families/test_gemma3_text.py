"""Gemma 3's text model against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
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
    "head_dim": 12,
    "sliding_window": 6,
    "query_pre_attn_scalar": 20,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {"sliding_window_pattern": 2, "num_hidden_layers": 4},
    "two rotations": {
        "layer_types": [FULL, SLIDING, SLIDING],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 200.0},
        },
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "no layer slides": {"layer_types": [FULL] * 3, "num_key_value_heads": 4},
}
_GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PUBLISHED = {
    "gemma-3-1b-it": (_GEMMA_3_1B, 999_885_952),
    "gemma-3-270m": (
        {
            **{key: value for key, value in _GEMMA_3_1B.items() if key != "sliding_window_pattern"},
            "_sliding_window_pattern": 6,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "layer_types": ([SLIDING] * 5 + [FULL]) * 3,
            "num_hidden_layers": 18,
            "use_bidirectional_attention": False,
        },
        268_098_176,
    ),
    "medgemma-27b-text-it": (
        {
            **_GEMMA_3_1B,
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        27_009_002_240,
    ),
    "gemma-3-4b-it, inside": (
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        3_880_263_168,
    ),
    "gemma-3-27b-it, inside": (
        {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        27_009_346_304,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "gemma3_text", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gemma3_text", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "gemma3_text", **{**TINY, "head_dim": 256, "num_hidden_layers": 6})
    gone = ["head_dim", "hidden_activation", "query_pre_attn_scalar", "rope_parameters", "layer_types"]
    cfg = check_reading(edit_config(folder, remove=[*gone, "sliding_window", "tie_word_embeddings"])).cfg
    assert cfg.windows == (4096,) * 5 + (None,)
    assert [one.base for one in cfg.positions] == [1e4] * 5 + [1e6]


OLD = ["rope_parameters", "layer_types"]


@pytest.mark.parametrize(
    ("remove", "changes", "bases"),
    [
        (OLD, {"sliding_window_pattern": 2, "rope_theta": 3000, "rope_local_base_freq": 50}, [50, 3000, 50]),
        (OLD, {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, [1e4, 1e4, 1e6]),
        (OLD, {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, [1e4, 1e6, 1e4]),
        ([], {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 4.0}}}, [1e4, 1e4, 1e6]),
        ([], {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 300.0}}}, [300, 300, 1e6]),
        ([], {"rope_parameters": {FULL: {"rope_theta": 700.0}, SLIDING: {"rope_type": "default"}}}, [1e4, 1e4, 700]),
    ],
)
def test_two_rotations_in_all_spellings(remove, changes, bases, tmp_path) -> None:
    """A scaling is that of layers that see all, whose base the others never share."""
    folder = save(tmp_path, "gemma3_text", **TINY, layer_types=[SLIDING, SLIDING, FULL])
    model = check_reading(edit_config(folder, remove=remove, max_position_embeddings=32, **changes))
    assert [one.base for one in model.cfg.positions] == bases
    sliding = [layer for layer, window in enumerate(model.cfg.windows) if window is not None]
    assert all(model.cfg.positions[layer].scaling is None for layer in sliding)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern is 0; expected at least 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, "an object for each of 'full_attention'"),
    ],
)
def test_what_transformers_does_not_read_is_refused(changes, found, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "gemma3_text", **TINY), **changes)
    with pytest.raises(UnsupportedModelError, match=found):
        open_checkpoint(folder)
