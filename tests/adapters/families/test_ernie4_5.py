"""ERNIE 4.5 against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, check_defaults, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "head_dim": 12,
}
VARIANTS = {
    "tied": {},
    "biases, untied": {"use_bias": True, "tie_word_embeddings": False, "rms_norm_eps": 0.0001},
    "all heads with keys": {
        "num_key_value_heads": None,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
FIRST = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_ernie4_5.Ernie4_5_Config",
        "AutoModel": "modeling_ernie4_5.Ernie4_5_Model",
        "AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_hidden_layers": 18,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": False,
    "vocab_size": 103424,
}
LATER = {
    **{key: value for key, value in FIRST.items() if key not in {"auto_map", "tie_word_embeddings"}},
    "initializer_range": 0.02,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
}
# Of one size, all others are mixtures.
PUBLISHED = {
    "ERNIE-4.5-0.3B-Base-PT, as first released": (FIRST, 360_748_032),
    "ERNIE-4.5-0.3B-PT": (LATER, 360_748_032),
    "ERNIE-4.5-0.3B-Base-PT": ({**LATER, "architectures": ["Ernie4_5ForCausalLM"]}, 360_748_032),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the rotation compute in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "ernie4_5", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "ernie4_5", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("ernie4_5", **TINY)
