"""Qwen3's mixtures against transformers, in every variant."""

import json

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.adapters.choice import find_family
from hooklens.adapters.families import load_families
from hooklens.config import MoEConfig, PartConfig
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, batch, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
VARIANTS = {
    "as published": {},
    "dense layers between": {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "attention_bias": True,
    },
    "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_experts_per_tok": 3},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "mlp_only_layers": [0]},
}
THIRTY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "Qwen3-30B-A3B": (THIRTY, 30_532_122_624),
    "Qwen3-235B-A22B": (
        {
            **THIRTY,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 94,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
        235_093_634_560,
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (
        {
            **{key: value for key, value in THIRTY.items() if key != "bos_token_id"},
            "intermediate_size": 5472,
            "max_position_embeddings": 262144,
            "max_window_layers": 28,
            "qkv_bias": False,
            "rope_theta": 10000000,
            "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0,
            "transformers_version": "4.52.3",
            "use_qk_norm": True,
        },
        30_532_122_624,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "qwen3_moe", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "qwen3_moe", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    """A head has its share of the width, where Qwen3 has 128; gates stay as they are."""
    folder = save(tmp_path, "qwen3_moe", **{**TINY, "head_dim": 8})
    edit_config(folder, remove=["head_dim", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"])
    cfg = open_checkpoint(folder).cfg
    assert cfg.d_head == 8
    assert cfg.mlp == MoEConfig(n_experts=5, experts_per_token=2, d_expert=24)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_goes_by_two_names(key: str, tmp_path) -> None:
    """Published files have the first; transformers 5 writes the second."""
    folder = save(tmp_path, "qwen3_moe", **TINY)
    edit_config(folder, remove=["num_experts", "num_local_experts"], **{key: 5})
    assert open_checkpoint(folder).cfg.mlp.n_experts == 5


def test_which_layers_are_dense(tmp_path) -> None:
    folder = save(tmp_path, "qwen3_moe", **{**TINY, **VARIANTS["dense layers between"]})
    kinds = [part.kind for part in open_checkpoint(folder).cfg.mlp]
    assert kinds == ["mlp", "moe", "mlp", "mlp"]


@pytest.mark.parametrize("layers", [[1, 0], [2, 3], [1]])
def test_some_of_the_layers_can_be_saved(layers: list[int], tmp_path) -> None:
    """Layers of one kind are described layer by layer, as those of two kinds are, and that is no other network.

    Such a description was taken for one that no checkpoint can express, be it of mixtures, windows or positions.
    """
    windows = {"use_sliding_window": True, "sliding_window": 6}
    folder = save(tmp_path, "qwen3_moe", **{**TINY, **VARIANTS["dense layers between"], **windows})
    model = HookedCausalLM.from_pretrained(folder, layers=layers)
    model.save_pretrained(tmp_path / "some")
    found = open_checkpoint(tmp_path / "some").cfg
    assert [(block.mlp, block.window) for block in found.blocks] == [
        (block.mlp, block.window) for block in model.cfg.blocks
    ]
    ids = batch("right")[0][:1]
    assert torch.equal(HookedCausalLM.from_pretrained(tmp_path / "some")(ids), model(ids))


@pytest.mark.parametrize("layers", [[2], [-1]])
def test_a_dense_layer_that_there_is_not_is_refused(layers: list[int], tmp_path) -> None:
    folder = save(tmp_path, "qwen3_moe", **TINY)
    edit_config(folder, mlp_only_layers=layers)
    with pytest.raises(UnsupportedModelError, match=r"mlp_only_layers is .*; expected layers from 0 to 1"):
        open_checkpoint(folder)


def test_a_part_that_is_neither_mlp_nor_mixture_is_refused(tmp_path) -> None:
    folder = save(tmp_path, "qwen3_moe", **TINY)
    cfg = open_checkpoint(folder).cfg.replace(mlp=(PartConfig(kind="mlp"), None))
    with pytest.raises(UnsupportedModelError, match=r"qwen3_moe checkpoint cannot express .*mlp="):
        find_family(json.loads(cfg.origin.hub_config), load_families(), where="here").write_config(cfg)
