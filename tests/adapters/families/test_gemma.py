"""Gemma against transformers, in every variant."""

import pytest

from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {},
    "one key-value head, biases": {"num_key_value_heads": 1, "attention_bias": True},
    "old name of the activation": {
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}
_GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}
PUBLISHED = {
    "gemma-2b": (_GEMMA_2B, 2_506_172_416),
    "gemma-7b": (
        {
            **_GEMMA_2B,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 16,
        },
        8_537_680_896,
    ),
    "gemma-1.1-2b-it": ({**_GEMMA_2B, "hidden_activation": None}, 2_506_172_416),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "gemma", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gemma", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "gemma", **{**TINY, "head_dim": 256})
    gone = ["head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.act_fn, cfg.d_head, cfg.embed_scale) == ("gelu_tanh", 256, 32**0.5)


@pytest.mark.parametrize("changes", [{"use_bidirectional_attention": True}, {"hidden_activation": "silu"}])
def test_other_networks_are_refused(changes, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "gemma", **TINY), **changes)
    with pytest.raises(UnsupportedModelError, match="the only value implemented"):
        check_reading(folder)
