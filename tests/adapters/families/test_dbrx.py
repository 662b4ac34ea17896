"""DBRX against transformers, in every variant."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import (
    D_VOCAB,
    TOLERANCE,
    cases,
    check,
    check_logits,
    load_reference,
    read_published,
    save,
    verify_folder,
)
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

ATTENTION = {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 10000.0}
MIXTURE = {"moe_num_experts": 5, "moe_top_k": 2, "ffn_hidden_size": 24}
TINY = {
    "vocab_size": D_VOCAB,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 64,
    "attn_config": ATTENTION,
    "ffn_config": MIXTURE,
}
VARIANTS = {
    "as published": {},
    "p-norm": {
        "attn_config": {**ATTENTION, "kv_n_heads": 4, "clip_qkv": 1.5},
        "ffn_config": {**MIXTURE, "moe_normalize_expert_weights": 2.0, "ffn_act_fn": {"name": "gelu"}, "moe_top_k": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "unnormed gates": {
        "attn_config": {**ATTENTION, "kv_n_heads": 1},
        "ffn_config": {**MIXTURE, "moe_normalize_expert_weights": None},
    },
}
BASE = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {
        "AutoConfig": "configuration_dbrx.DbrxConfig",
        "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
    },
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}
# There are no others.
PUBLISHED = {
    "dbrx-base": (BASE, 131_596_523_520),
    # Written by a version that put the defaults of all configs into the nested ones.
    "dbrx-instruct": (
        {
            **BASE,
            "attn_config": {
                **BASE["attn_config"],
                "attn_pdrop": 0,
                "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
                "max_length": 20,
                "output_hidden_states": False,
                "return_dict": True,
                "temperature": 1.0,
                "tie_word_embeddings": True,
                "top_k": 50,
                "top_p": 1.0,
                "torch_dtype": None,
            },
            "ffn_config": {
                **BASE["ffn_config"],
                "ffn_act_fn": {"name": "silu"},
                "moe_normalize_expert_weights": 1,
                "return_dict": True,
                "temperature": 1.0,
                "tie_word_embeddings": True,
                "uniform_expert_assignment": False,
            },
            "transformers_version": "4.39.2",
        },
        131_596_523_520,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # No part of it computes in float32, but the rotary tables.
    folder = save(tmp_path, "dbrx", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "dbrx", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ({}, 500000.0),
        ({"rope_theta": 2000.0}, 2000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}, 3000.0),
    ],
)
def test_the_base_stands_at_the_top_or_with_attention(given, base, tmp_path) -> None:
    folder = save(tmp_path, "dbrx", **TINY)
    edit_config(folder, remove=["rope_parameters"], **given, attn_config={**ATTENTION, "rope_theta": 500000})
    assert open_checkpoint(folder).cfg.positions.base == base


def test_what_is_saved_has_the_base_in_both_places(tmp_path) -> None:
    """transformers computes with the one at the top, which published configs lack."""
    folder = save(tmp_path, "dbrx", **TINY)
    edit_config(folder, remove=["rope_parameters"], attn_config={**ATTENTION, "rope_theta": 500000})
    model = HookedCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    reference = load_reference(tmp_path / "saved", torch.float32)
    assert reference.config.rope_parameters["rope_theta"] == 500000
    check_logits(model, reference, TOLERANCE[torch.float32])


def test_tying_is_refused(tmp_path) -> None:
    folder = save(tmp_path, "dbrx", **TINY)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings is True; expected False"):
        open_checkpoint(folder)


def test_sizes_are_not_guessed(tmp_path) -> None:
    """transformers would take four experts, one for each token, and one key-value head."""
    folder = save(tmp_path, "dbrx", **TINY)
    edit_config(folder, remove=["ffn_config", "attn_config"])
    with pytest.raises(
        UnsupportedModelError, match=r"attn_config\.kv_n_heads is missing.*ffn_config\.moe_top_k is mis"
    ):
        open_checkpoint(folder)
