"""DeepSeek-V2 against transformers, in every variant."""

import json

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import MLAConfig, MoEConfig, PartConfig
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import (
    D_VOCAB,
    cases,
    check,
    check_reading,
    read_config,
    read_published,
    save,
    verify_folder,
)
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
VARIANTS = {
    "as published": {"routed_scaling_factor": 2.5, "rope_parameters": YARN, **GROUPS},
    # An epsilon that would show where the norms of latents took it over.
    "lite": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 0.05, "v_head_dim": 20},
    "biases": {"attention_bias": True, "first_k_dense_replace": 0, "rope_parameters": {**YARN, "mscale_all_dim": 0}},
    "lite with biases, tied": {
        "attention_bias": True,
        "q_lora_rank": None,
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 2,
        **GROUPS,
        "topk_group": 1,
    },
    "dense": {"first_k_dense_replace": 2, "n_shared_experts": 1, "rope_parameters": {**YARN, "mscale": 0}},
}
LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
LARGE = {
    **LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
PUBLISHED = {
    "DeepSeek-V2-Lite": (LITE, 15_706_484_224),
    "DeepSeek-V2": (LARGE, 235_741_434_880),
    "DeepSeek-V2.5": (
        {**LARGE, "ep_size": 1, "rope_scaling": {**LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0}},
        235_741_434_880,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm, the rotation and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "deepseek_v2", **{**TINY, **VARIANTS[variant]})
    model = check(folder, whole=whole, float64=1e-5)
    if variant != "dense":
        check_routing(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "deepseek_v2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v2", **TINY)
    written = json.loads((folder / "config.json").read_text())
    kept = {*TINY, "model_type"} - {"first_k_dense_replace", "max_position_embeddings"}
    edit_config(folder, remove=[key for key in written if key not in kept])
    cfg = read_config(json.loads((folder / "config.json").read_text()))
    assert cfg.attn == MLAConfig(q_rank=18, kv_rank=14, d_nope=10, d_rope=6, d_head_v=9, norm_eps=1e-6)
    assert cfg.mlp == MoEConfig(n_experts=6, experts_per_token=2, d_expert=12, d_shared=24, router_float32=True)
    assert (cfg.d_head, cfg.n_kv_heads, cfg.n_ctx, cfg.attn_scale) == (16, 4, 2048, None)


def test_heads_of_keys_and_their_width_say_nothing(tmp_path) -> None:
    """transformers derives the one, and takes any number from that of the heads on for as many."""
    folder = save(tmp_path, "deepseek_v2", **{**TINY, "num_hidden_layers": 1, "first_k_dense_replace": 1})
    edit_config(folder, num_key_value_heads=128, head_dim=99)
    cfg = check_reading(folder).cfg
    assert (cfg.n_kv_heads, cfg.d_head, cfg.mlp) == (4, 16, PartConfig(kind="mlp"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk_method": "random"}, "topk_method is 'random'; expected 'greedy' or 'group_limited_greedy'"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True; expected False"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; expected 'softmax'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; expected 1"),
        ({"mlp_bias": True}, "mlp_bias is True; expected False"),
        (
            {"rope_parameters": {**YARN, "rope_type": "linear"}},
            r"rope_parameters.mscale_all_dim is 1.3; expected none, but with 'yarn'",
        ),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected as many as num_attention_heads"),
        ({"qk_rope_head_dim": 5}, "d_rope=5; entries turn in pairs"),
    ],
)
def test_what_is_not_implemented_is_refused(given, message: str, tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v2", **TINY)
    edit_config(folder, **given)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)


def test_the_rank_of_queries_is_asked_for(tmp_path) -> None:
    """Null is none; where the key is absent transformers takes that of one checkpoint."""
    folder = save(tmp_path, "deepseek_v2", **TINY)
    edit_config(folder, remove=["q_lora_rank"])
    with pytest.raises(UnsupportedModelError, match="q_lora_rank is missing"):
        open_checkpoint(folder)
