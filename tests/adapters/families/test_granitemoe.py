"""Granite's mixtures against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.adapters.choice import find_family
from hooklens.adapters.families import load_families
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15,
    "logits_scaling": 3.0,
}
VARIANTS = {
    "as published": {"tie_word_embeddings": True},
    "head size": {"head_dim": 12, "num_experts_per_tok": 3, "attention_bias": True},
    "untied, without factors": {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
        "num_key_value_heads": 4,
    },
}
SMALL = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 49152,
}
PUBLISHED = {
    "granite-3.0-1b-a400m-base": (SMALL, 1_334_625_280),
    "granite-3.1-1b-a400m-base": (
        {
            **SMALL,
            "attention_dropout": 0.1,
            "max_position_embeddings": 131072,
            "rope_theta": 1500000.0,
            "router_aux_loss_coef": 0.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "vocab_size": 49155,
        },
        1_334_628_352,
    ),
    "granite-3.1-3b-a800m-base": (
        {
            **SMALL,
            "attention_dropout": 0.1,
            "hidden_size": 1536,
            "max_position_embeddings": 131072,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_local_experts": 40,
            "rope_theta": 10000000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.46.0",
        },
        3_298_788_864,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "granitemoe", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "granitemoe", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    """All factors are 1, that on scores, too."""
    folder = save(tmp_path, "granitemoe", **{**TINY, "num_key_value_heads": 4})
    factors = ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"]
    edit_config(folder, remove=[*factors, "num_key_value_heads"])
    cfg = open_checkpoint(folder).cfg
    assert (cfg.embed_scale, cfg.residual_scale, cfg.attn_scale, cfg.logits_scale) == (None, 1.0, 1.0, 1.0)
    assert cfg.n_kv_heads == 4


@pytest.mark.parametrize("divisor", [3.0, 49.0, 0.3, 7.25])
def test_the_divisor_of_logits_comes_back(divisor: float) -> None:
    """The inverse of a number's inverse need not be the number itself, nor have the same inverse."""
    family = find_family({"model_type": "granitemoe"}, load_families(), where="here")
    cfg = family.read_config({"model_type": "granitemoe", **TINY, "logits_scaling": divisor}, where="here")
    assert cfg.logits_scale == 1 / divisor
    assert family.write_config(cfg.replace(origin=None))["logits_scaling"] == divisor
