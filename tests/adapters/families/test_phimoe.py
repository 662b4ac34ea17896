"""Phi's mixture against transformers, in every variant."""

import pytest

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
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
    "router_jitter_noise": 0.2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.4, 1.9, 2.5],
    "long_factor": [1.0, 3.0, 6.0, 9.0],
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "as published": {
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": LONGROPE,
        "sliding_window": 64,
    },
    "window": {"head_dim": 12, "sliding_window": 6, "router_jitter_noise": 0.5},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "router_jitter_noise": 0.01},
}
# Of 64 factors that are published, any stand for the others here.
FACTORS = {
    "long_factor": [1.0199999809265137] * 64,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0499999523162842] * 64,
    "short_mscale": 1.243163121016122,
    "type": "longrope",
}
LARGE = {
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phimoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": FACTORS,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32064,
}
SLIM = {
    **{key: value for key, value in LARGE.items() if key != "original_max_position_embeddings"},
    "auto_map": {
        "AutoConfig": "configuration_slimmoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_slimmoe.PhiMoEForCausalLM",
    },
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "sliding_window": 2047,
}
PUBLISHED = {
    "Phi-3.5-MoE-instruct": (LARGE, 41_873_153_344),
    "Phi-mini-MoE-instruct": ({**SLIM, "intermediate_size": 960}, 7_647_632_704),
    "Phi-tiny-MoE-instruct": (
        {**SLIM, "intermediate_size": 448, "num_attention_heads": 16, "num_key_value_heads": 4},
        3_755_220_288,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # No part of it computes in float32, but the rotary tables.
    folder = save(tmp_path, "phimoe", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "phimoe", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    folder = save(tmp_path, "phimoe", **TINY)
    edit_config(folder, remove=["rope_parameters", "router_jitter_noise", "sliding_window", "rms_norm_eps"])
    cfg = open_checkpoint(folder).cfg
    assert (cfg.positions.base, cfg.mlp.sparsemixer_eps, cfg.windows, cfg.norm.eps) == (1e6, 0.01, None, 1e-5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**LONGROPE, "long_mscale": 1.3}, r"long_mscale is 1\.3; expected 1\.243"),
        ({key: value for key, value in LONGROPE.items() if key != "short_mscale"}, "short_mscale is missing"),
        ({**LONGROPE, "rope_type": "yarn"}, "rope_type is 'yarn'; expected 'default' or 'longrope'"),
    ],
)
def test_another_scaling_is_refused(rope, message: str, tmp_path) -> None:
    folder = save(tmp_path, "phimoe", **TINY)
    edit_config(folder, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)


def test_no_length_changes_the_rotation(tmp_path) -> None:
    """Factors are those of short sequences at every length, so that what is cached stays right."""
    model = HookedCausalLM.from_pretrained(save(tmp_path, "phimoe", **{**TINY, **VARIANTS["as published"]}))
    scaling = model.cfg.positions.scaling
    assert scaling.short_factors == scaling.long_factors == tuple(LONGROPE["short_factor"])
    assert scaling.attention_factor == LONGROPE["short_mscale"]
    assert not model.depends_on_length(64)


def test_more_than_two_experts_are_refused(tmp_path) -> None:
    """transformers chooses two whatever the key says."""
    folder = save(tmp_path, "phimoe", **TINY)
    edit_config(folder, num_experts_per_tok=3)
    with pytest.raises(UnsupportedModelError, match="sparsemixer' chooses two experts"):
        open_checkpoint(folder)
