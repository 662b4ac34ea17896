"""OLMo against transformers, in every variant."""

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
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {},
    "clipped, biases": {"clip_qkv": 1.5, "attention_bias": True, "num_key_value_heads": 4},
    "tied, head size": {"tie_word_embeddings": True, "head_dim": 12},
}
_OLMO_1B = {
    "architectures": ["OlmoForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "model_type": "olmo",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 1,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
_OLMO_7B = {
    **_OLMO_1B,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "OLMo-1B-hf": (_OLMO_1B, 1_176_764_416),
    "OLMo-7B-hf": (_OLMO_7B, 6_888_095_744),
    "OLMo-7B-0724-hf": ({**_OLMO_7B, "clip_qkv": 8.0, "max_position_embeddings": 4096}, 6_888_095_744),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # LayerNorm and rotary tables are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "olmo", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "olmo", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "olmo", **{**TINY, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "hidden_act", "clip_qkv", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.n_kv_heads, cfg.clip_qkv, cfg.tied_unembed) == (4, None, False)
