"""Gemma 2 against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
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
    "plain": {},
    "no caps, other layers slide": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": [FULL, SLIDING, SLIDING],
    },
    "no layer slides": {"layer_types": [FULL] * 3, "num_key_value_heads": 4},
    "untied, biases, tight caps": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
_GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
PUBLISHED = {
    "gemma-2-2b": (_GEMMA_2_2B, 2_614_341_888),
    "gemma-2-9b": (
        {
            **_GEMMA_2_2B,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "sliding_window_size": 4096,
        },
        9_241_705_984,
    ),
    "gemma-2-27b": (
        {
            **_GEMMA_2_2B,
            "head_dim": 128,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
            "_attn_implementation": "eager",
        },
        27_227_128_320,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the softmax compute in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "gemma2", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gemma2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    """Absent caps are those of the first release, and null is none."""
    folder = save(tmp_path, "gemma2", **{**TINY, "head_dim": 256})
    gone = ["head_dim", "hidden_activation", "query_pre_attn_scalar", "rope_parameters", "layer_types"]
    gone += ["attn_logit_softcapping", "final_logit_softcapping", "tie_word_embeddings", "sliding_window"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.attn_softcap, cfg.logits_softcap, cfg.attn_scale) == (50.0, 30.0, 256**-0.5)
    assert cfg.windows == (4096, None, 4096)


def test_odd_layers_slide_only_where_they_are_named(tmp_path) -> None:
    folder = save(tmp_path, "gemma2", **TINY)
    assert open_checkpoint(folder).cfg.windows == (6, None, 6)
    assert open_checkpoint(edit_config(folder, layer_types=[FULL, SLIDING, FULL])).cfg.windows == (None, 6, None)
    assert open_checkpoint(edit_config(folder, sliding_window=None)).cfg.windows is None
