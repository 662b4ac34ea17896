"""Arcee against transformers, in every variant."""

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
}
VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.0001},
    "tied, head size, yarn": {
        "tie_word_embeddings": True,
        "num_key_value_heads": None,
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
AFM = {
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128003,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": 20,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 20.0,
        "mscale": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.3",
    "use_cache": False,
    "vocab_size": 128005,
}
_OF_BASE = {"eos_token_id": 128001, "transformers_version": "4.53.2"}
PUBLISHED = {
    "AFM-4.5B": (AFM, 4_619_189_760),
    "AFM-4.5B-Base": ({**AFM, **_OF_BASE, "vocab_size": 128004}, 4_619_184_640),
    "AFM-4.5B-Base-Pre-Anneal": (
        {
            **{key: value for key, value in AFM.items() if key != "rope_scaling"},
            **_OF_BASE,
            "max_position_embeddings": 4096,
            "vocab_size": 128256,
        },
        4_620_474_880,
    ),
    "AFM-4.5B-Preview": (
        {
            **AFM,
            "pretraining_tp": 1,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 20.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "transformers_version": "4.54.1",
            "vocab_size": 128064,
        },
        4_619_491_840,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "arcee", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "arcee", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("arcee", **TINY)
