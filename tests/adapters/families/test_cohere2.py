"""Cohere's Command R7B against transformers, in every variant."""

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
    "logit_scale": 2.0,
    "sliding_window": 6,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {"num_hidden_layers": 5},
    "first layer sees all, biases": {"layer_types": [FULL, SLIDING, FULL], "attention_bias": True, "head_dim": 12},
    "untied": {"tie_word_embeddings": False, "sliding_window_pattern": 2, "num_key_value_heads": 4},
    "no layer slides": {"layer_types": [FULL] * 3},
}
_R7B = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 132096,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "vocab_size": 256000,
}
PUBLISHED = {
    "c4ai-command-r7b-12-2024": (_R7B, 8_028_033_024),
    "c4ai-command-a-03-2025": (
        {
            **_R7B,
            "hidden_size": 12288,
            "intermediate_size": 36864,
            "max_position_embeddings": 131072,
            "num_attention_heads": 96,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
        },
        111_057_580_032,
    ),
    "tiny-aya-base": (
        {
            **{key: value for key, value in _R7B.items() if key != "sliding_window_pattern"},
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ([SLIDING] * 3 + [FULL]) * 9,
            "logit_scale": 1.0,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "use_qk_norm": False,
            "vocab_size": 262144,
        },
        3_349_227_520,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # LayerNorm and rotary tables are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "cohere2", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "cohere2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "cohere2", **{**TINY, "num_hidden_layers": 4, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "head_dim", "logit_scale", "rope_parameters", "layer_types", "sliding_window"]
    cfg = check_reading(edit_config(folder, remove=[*gone, "tie_word_embeddings"])).cfg
    assert (cfg.windows, cfg.logits_scale) == ((4096, 4096, 4096, None), 0.0625)
    assert [isinstance(one, NoPositions) for one in cfg.positions] == [False, False, False, True]


@pytest.mark.parametrize("key", ["use_qk_norm", "use_parallel_block", "use_gated_activation"])
def test_notes_that_describe_another_network_are_refused(key: str, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "cohere2", **TINY), **{key: key == "use_qk_norm"})
    with pytest.raises(UnsupportedModelError, match=key):
        open_checkpoint(folder)
