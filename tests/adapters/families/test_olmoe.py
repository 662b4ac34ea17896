"""OLMoE against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import MoEConfig
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "as published": {},
    "clipped": {"clip_qkv": 0.7, "num_key_value_heads": 2, "norm_topk_prob": True},
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
}
FIRST = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
PUBLISHED = {
    "OLMoE-1B-7B-0924": (FIRST, 6_919_161_856),
    "OLMoE-1B-7B-0924-Instruct": ({**FIRST, "transformers_version": "4.45.0.dev0"}, 6_919_161_856),
    "OLMoE-1B-7B-0125": ({**FIRST, "rms_norm_eps": 1e-05, "transformers_version": "4.47.0"}, 6_919_161_856),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "olmoe", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "olmoe", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    folder = save(tmp_path, "olmoe", **TINY)
    edit_config(folder, remove=["num_key_value_heads", "clip_qkv", "rms_norm_eps", "norm_topk_prob"])
    cfg = open_checkpoint(folder).cfg
    assert (cfg.n_kv_heads, cfg.clip_qkv, cfg.norm.eps) == (4, None, 1e-5)
    assert cfg.mlp == MoEConfig(n_experts=6, experts_per_token=3, d_expert=24)


def test_the_number_of_experts_goes_by_two_names(tmp_path) -> None:
    folder = save(tmp_path, "olmoe", **TINY)
    edit_config(folder, remove=["num_experts"], num_local_experts=6)
    assert open_checkpoint(folder).cfg.mlp.n_experts == 6
