"""`HookedTransformerConfig` against that of TransformerLens 2.18."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch

from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.errors import ConfigError, UnsupportedModelError
from tests.adapters.formats.test_transformer_lens_config import BASE, VARIANTS

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "d_head": 8, "act_fn": "gelu", "d_vocab": 50}
# Its fields in their order.
FIELDS = [
    "n_layers", "d_model", "n_ctx", "d_head", "model_name", "n_heads", "d_mlp", "act_fn", "d_vocab", "eps",
    "use_attn_result", "use_attn_scale", "attn_scale", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in",
    "use_qk_norm", "use_local_attn", "ungroup_grouped_query_attention", "original_architecture", "from_checkpoint",
    "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "tokenizer_name", "window_size", "attn_types",
    "init_mode", "normalization_type", "device", "n_devices", "attention_dir", "attn_only", "seed",
    "initializer_range", "init_weights", "scale_attn_by_inverse_layer_idx", "positional_embedding_type", "final_rms",
    "d_vocab_out", "parallel_attn_mlp", "rotary_dim", "n_params", "use_hook_tokens", "gated_mlp",
    "default_prepend_bos", "dtype", "tokenizer_prepends_bos", "n_key_value_heads", "post_embedding_ln", "rotary_base",
    "rotary_base_local", "trust_remote_code", "rotary_adjacent_pairs", "load_in_4bit", "num_experts",
    "experts_per_token", "relative_attention_max_distance", "relative_attention_num_buckets",
    "decoder_start_token_id", "tie_word_embeddings", "use_normalization_before_and_after", "attn_scores_soft_cap",
    "output_logits_soft_cap", "use_NTK_by_parts_rope", "NTK_by_parts_low_freq_factor",
    "NTK_by_parts_high_freq_factor", "NTK_by_parts_factor", "NTK_original_ctx_len",
]  # fmt: skip


def test_fields_stand_in_the_order_of_2x() -> None:
    assert [spec.name for spec in dataclasses.fields(HookedTransformerConfig)] == FIELDS
    assert list(HookedTransformerConfig(2, 32, 16, 8, act_fn="relu").to_dict()) == FIELDS


@pytest.mark.parametrize(
    ("changes", "derived"),
    [
        ({}, {"n_heads": 4, "d_mlp": 128, "d_vocab_out": 50, "n_params": 24576, "attn_scale": 8**0.5}),
        ({}, {"initializer_range": 0.8 / 32**0.5, "rotary_dim": None, "dtype": torch.float32}),
        ({"init_mode": "xavier_normal"}, {"initializer_range": 1.0}),
        ({"attn_only": True, "act_fn": None}, {"d_mlp": None, "n_params": 8192}),
        ({"gated_mlp": True, "d_mlp": 48, "d_vocab_out": 3}, {"n_params": 17408, "d_vocab_out": 3}),
        ({"num_experts": 4, "experts_per_token": 2}, {"n_params": 73984}),
        ({"positional_embedding_type": "rotary"}, {"rotary_dim": 8}),
        ({"use_attn_scale": False}, {"attn_scale": -1.0}),
        ({"n_heads": 3}, {"n_heads": 3, "n_params": 22528}),
        ({"d_vocab": -1}, {"d_vocab_out": -1}),
    ],
)
def test_what_follows_from_other_fields(changes: dict[str, Any], derived: dict[str, Any]) -> None:
    cfg = HookedTransformerConfig(**{**SIZES, **changes})
    assert {name: getattr(cfg, name) for name in derived} == derived


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"act_fn": None}, "act_fn=None must be one of"),
        ({"act_fn": "mish"}, "act_fn='mish' must be one of"),
        ({"use_local_attn": True}, "needs window_size; use_local_attn needs attn_types"),
        ({"num_experts": 2}, "go together"),
        ({"n_devices": 64}, "n_devices=64"),
    ],
)
def test_what_2x_asserts(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        HookedTransformerConfig(**{**SIZES, **changes})


def test_dictionaries_and_text() -> None:
    cfg = HookedTransformerConfig.from_dict(SIZES)
    assert HookedTransformerConfig.unwrap(SIZES) == cfg
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    assert HookedTransformerConfig(**cfg.to_dict()) == cfg
    cfg.to_dict()["use_attn_result"] = True
    assert cfg.use_attn_result
    assert repr(cfg).startswith("HookedTransformerConfig:\n{'NTK_by_parts_factor': 8.0,\n")
    assert cfg != HookedTransformerConfig.from_dict(SIZES)
    assert not cfg.is_layer_norm_activation()
    assert HookedTransformerConfig(**{**SIZES, "act_fn": "solu_ln"}).is_layer_norm_activation()
    with pytest.raises(TypeError, match="d_modell"):
        HookedTransformerConfig(**SIZES, d_modell=3)


def test_a_seed_seeds_every_generator() -> None:
    drawn = []
    for _ in range(2):
        HookedTransformerConfig(**SIZES, seed=5)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_go_to_hooklens_and_back(name: str) -> None:
    config = {**BASE, **VARIANTS[name], "device": "cpu", "initializer_range": 0.3}
    cfg = HookedTransformerConfig(**config)
    network = cfg.to_hooked_config()
    assert (network.init_std, network.init_scheme) == (0.3, "gpt2")
    back = HookedTransformerConfig.from_hooked_config(network, device="cpu", model_name="custom")
    assert back.to_hooked_config() == network
    assert back.n_params == cfg.n_params
    other = {key for key, value in cfg.to_dict().items() if getattr(back, key) != value}
    assert other <= {"act_fn", "final_rms"}


def test_init_modes() -> None:
    for mode in ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP"):
        network = HookedTransformerConfig(**SIZES, init_mode=mode).to_hooked_config()
        assert network.init_scheme == mode
        assert HookedTransformerConfig.from_hooked_config(network).init_mode == mode
    with pytest.raises(ConfigError, match="init_mode='orthogonal'; expected one of gpt2, xavier_uniform"):
        HookedTransformerConfig(**SIZES, init_mode="orthogonal").to_hooked_config()


def test_what_cannot_be_said_is_told() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"HookedTransformerConfig: describes a network .* d_vocab is missing"
    ):
        HookedTransformerConfig(**{**SIZES, "d_vocab": -1}).to_hooked_config()
    network = HookedTransformerConfig(**SIZES).to_hooked_config().replace(residual_scale=0.5, attn_sinks=True)
    with pytest.warns(
        UserWarning, match="no words for attn_sinks=True; residual_scale=0.5: its fields are the nearest"
    ):
        HookedTransformerConfig.from_hooked_config(network)
