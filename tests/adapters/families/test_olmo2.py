"""OLMo 2 against transformers, in every variant."""

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
    "tied, biases": {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "head size": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
_OLMO_2_1B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
PUBLISHED = {
    "OLMo-2-0425-1B": (_OLMO_2_1B, 1_484_916_736),
    "OLMo-2-1124-7B": (
        {
            **_OLMO_2_1B,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        7_298_617_344,
    ),
    "OLMo-2-1124-13B": (
        {
            **_OLMO_2_1B,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
        13_716_198_400,
    ),
    "OLMo-2-0325-32B": (
        {
            **_OLMO_2_1B,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
        },
        32_234_279_936,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "olmo2", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "olmo2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "olmo2", **{**TINY, "num_key_value_heads": 4})
    gone = ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.n_kv_heads, cfg.norm.eps, cfg.tied_unembed) == (4, 1e-5, False)
