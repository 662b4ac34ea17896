"""Llama 4's text decoder against transformers, in every variant."""

import json

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import MoEConfig, NoPositions, NormConfig, QueryTemperature, RotaryPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 7,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "pad_token_id": 0,
}
VARIANTS = {
    "Scout": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    # Both limits are one: no wave lies between them, and the share of those that would has no value.
    "Scout, instruct": {
        "num_hidden_layers": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        },
    },
    "Maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2},
    "layers listed": {
        "num_hidden_layers": 3,
        "no_rope_layers": [0, 1, 1],
        "moe_layers": [2],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_bias": True,
    },
    "tied, untuned, no chunks": {
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "attn_temperature_tuning": False,
        "no_rope_layer_interval": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
}
SCOUT = {
    "architectures": ["Llama4ForCausalLM"],
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "cache_implementation": "hybrid",
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 262144,
    "model_type": "llama4_text",
    "moe_layers": list(range(48)),
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
PUBLISHED = {
    "the text of Llama-4-Scout-17B-16E": (SCOUT, 107_769_861_120),
    "the text of Llama-4-Scout-17B-16E-Instruct": (
        {
            **SCOUT,
            "_attn_implementation_autoset": True,
            "max_position_embeddings": 10485760,
            "rope_scaling": {**SCOUT["rope_scaling"], "factor": 16.0, "high_freq_factor": 1.0},
        },
        107_769_861_120,
    ),
    "Llama-4-Scout-17B-16E, layers by rule": (
        {**{key: value for key, value in SCOUT.items() if key != "moe_layers"}, "no_rope_layers": []},
        107_769_861_120,
    ),
    "the text of Llama-4-Maverick-17B-128E": (
        {
            **SCOUT,
            "interleave_moe_layer_step": 2,
            "max_position_embeddings": 1048576,
            "moe_layers": list(range(1, 48, 2)),
            "num_local_experts": 128,
            "rope_scaling": None,
            "use_qk_norm": False,
        },
        400_711_848_960,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # Norms, rotation and the router's sigmoid compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "llama4_text", **{**TINY, **VARIANTS[variant]})
    is_tuned = VARIANTS[variant].get("attn_temperature_tuning", True)
    check_routing(check(folder, whole=whole, float64=1e-5, counts_padding=is_tuned), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "llama4_text", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    folder = save(tmp_path, "llama4_text", **{**TINY, "head_dim": 128})
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    kept |= {"intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok"}
    written = json.loads((folder / "config.json").read_text())
    edit_config(folder, remove=[key for key in written if key not in {*kept, "model_type"}])
    cfg = open_checkpoint(folder).cfg
    rotary = RotaryPositions(dim=128, base=5e5, layout="interleaved")
    norm = NormConfig(kind="rms", eps=1e-5, weight=False, bias=False)
    assert cfg.positions == (rotary, rotary, rotary, NoPositions())
    assert cfg.chunks == (8192, 8192, 8192, None)
    assert cfg.qk_norm == (norm, norm, norm, None)
    assert cfg.query_temperature == (None, None, None, QueryTemperature(scale=0.1, length=8192, offset=1))
    assert cfg.mlp == MoEConfig(n_experts=5, experts_per_token=1, d_expert=24, d_shared=24, router="sigmoid_input")


def test_a_number_switches_the_temperature(tmp_path) -> None:
    """The releases have 4 there, where transformers wants a flag."""
    folder = save(tmp_path, "llama4_text", **TINY)
    temperatures = []
    for number in (4, 0):
        edit_config(folder, attn_temperature_tuning=number)
        temperatures.append(open_checkpoint(folder).cfg.query_temperature)
    assert temperatures == [(None, None, None, QueryTemperature(scale=0.5, length=4, offset=1)), None]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, r"layer_types is .* \['sliding_attention'\] are not implemented"),
        ({"moe_layers": [0, 4]}, r"moe_layers is \[0, 4\]; expected layers from 0 to 3"),
        ({"moe_layers": None, "interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0; expected a number"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; expected a number"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; expected one for each of 4 layers"),
    ],
)
def test_layers_that_are_none_are_refused(given, message: str, tmp_path) -> None:
    folder = save(tmp_path, "llama4_text", **TINY)
    edit_config(folder, **given)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)
