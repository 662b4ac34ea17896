"""Qwen2's mixtures against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
VARIANTS = {
    "as published": {},
    "windows and dense layers between": {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "norm_topk_prob": True,
    },
    "typed layers": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "qkv_bias": False,
    },
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "num_experts_per_tok": 3},
}
SMALL = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LARGE = {
    **SMALL,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 131072,
    "transformers_version": "4.40.1",
}
PUBLISHED = {
    "Qwen1.5-MoE-A2.7B": (SMALL, 14_315_784_192),
    "Qwen2-57B-A14B": (LARGE, 57_408_658_944),
    "Qwen2-57B-A14B-Instruct": (
        {**LARGE, "eos_token_id": 151645, "max_position_embeddings": 32768, "sliding_window": 65536},
        57_408_658_944,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "qwen2_moe", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "qwen2_moe", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ({}, None),
        ({"sliding_window": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 6}, (6, None, 6, None)),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, (6, None, None, None)),
        ({"use_sliding_window": True}, (4096, None, 4096, None)),
    ],
)
def test_windows_of_a_config_without_layer_types(given, windows, tmp_path) -> None:
    """They alternate, up to a layer; in Qwen2 they begin there."""
    folder = save(tmp_path, "qwen2_moe", **{**TINY, "num_hidden_layers": 4})
    edit_config(folder, remove=["layer_types", "sliding_window", "max_window_layers"], **given)
    assert open_checkpoint(folder).cfg.windows == windows


def test_biases_where_the_config_is_silent(tmp_path) -> None:
    folder = save(tmp_path, "qwen2_moe", **TINY)
    edit_config(folder, remove=["qkv_bias"])
    cfg = open_checkpoint(folder).cfg
    assert (cfg.qkv_bias, cfg.out_bias) == (True, False)
