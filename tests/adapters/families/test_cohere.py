"""Cohere's Command R against transformers, in every variant."""

import pytest

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
    "logit_scale": 2.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {},
    "norms of queries and keys, biases": {"use_qk_norm": True, "attention_bias": True},
    "untied, head size": {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 12},
    "norms of queries and keys, scaled rotary": {
        "use_qk_norm": True,
        "layer_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0},
    },
}
_COMMAND_R = {
    "architectures": ["CohereForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 22528,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "model_type": "cohere",
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rope_theta": 8000000.0,
    "torch_dtype": "float16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 256000,
}
PUBLISHED = {
    "c4ai-command-r-v01": (_COMMAND_R, 34_980_831_232),
    "c4ai-command-r-plus": (
        {
            **_COMMAND_R,
            "hidden_size": 12288,
            "intermediate_size": 33792,
            "logit_scale": 0.8333333333333334,
            "num_attention_heads": 96,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "rope_theta": 75000000.0,
            "use_qk_norm": True,
        },
        103_810_674_688,
    ),
    "aya-23-8B": (
        {
            **{key: value for key, value in _COMMAND_R.items() if key not in ("model_max_length", "pretraining_tp")},
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000,
            "use_qk_norm": False,
        },
        8_028_033_024,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # LayerNorm and rotary tables are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "cohere", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "cohere", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "cohere", **{**TINY, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "logit_scale", "use_qk_norm", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.logits_scale, cfg.positions.base, cfg.tied_unembed) == (0.0625, 5e5, True)
