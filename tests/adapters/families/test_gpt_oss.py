"""gpt-oss against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import MoEConfig, RotaryScaling
from hooklens.errors import CheckpointError, UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

# Weights this wide reach the limits of the experts' activation.
SPREAD = 0.4
TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
    "rope_theta": 150000.0,
}
VARIANTS = {
    "as published": {"rope_parameters": YARN},
    "limits": {
        "swiglu_limit": 1.5,
        "swiglu_alpha": 1.1,
        "layer_types": ["full_attention", "sliding_attention"],
        # With a base this small, bounds that are rounded are others.
        "rope_parameters": {**YARN, "truncate": True, "rope_theta": 20.0},
    },
    "tied, no biases, all layers full": {
        "tie_word_embeddings": True,
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "num_key_value_heads": 4,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
TWENTY = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
PUBLISHED = {
    # Without `quantization_config`: as a dequantised copy has it.
    "gpt-oss-20b": (TWENTY, 20_914_757_184),
    "gpt-oss-20b-BF16 of unsloth": ({**TWENTY, "torch_dtype": "bfloat16", "unsloth_fixed": True}, 20_914_757_184),
    "gpt-oss-120b": (
        {
            **TWENTY,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
            "num_hidden_layers": 36,
            "num_local_experts": 128,
        },
        116_829_156_672,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "gpt_oss", spread=SPREAD, **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gpt_oss", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    """Without any word on rotary it is YaRN with the release's numbers, over a base of 150000."""
    folder = save(tmp_path, "gpt_oss", **{**TINY, "head_dim": 64})
    silent = ["layer_types", "rope_parameters", "swiglu_limit", "swiglu_alpha", "attention_bias", "head_dim"]
    edit_config(folder, remove=[*silent, "max_position_embeddings", "sliding_window", "rms_norm_eps"])
    cfg = open_checkpoint(folder).cfg
    assert cfg.positions.base == 150000.0
    assert cfg.positions.scaling == RotaryScaling(kind="yarn", factor=32.0, original_n_ctx=4096, truncate=False)
    assert cfg.mlp == MoEConfig(
        n_experts=5,
        experts_per_token=2,
        d_expert=24,
        gate_norm=1.0,
        router_bias=True,
        expert_bias=True,
        act_fn="clamped_swiglu",
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
    )
    assert (cfg.windows, cfg.d_head, cfg.qkv_bias, cfg.out_bias) == ((128, None), 64, True, True)


def test_another_activation_is_refused(tmp_path) -> None:
    """transformers ignores the key; whoever set it meant something else."""
    folder = save(tmp_path, "gpt_oss", **TINY)
    edit_config(folder, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match=r"hidden_act is 'gelu'; expected 'silu'"):
        open_checkpoint(folder)


def test_the_number_of_experts_is_checked_against_the_tensors(tmp_path) -> None:
    folder = save(tmp_path, "gpt_oss", **TINY)
    edit_config(folder, num_local_experts=4)
    with pytest.raises(CheckpointError, match=r"gate_up_proj' is \[5, 32, 48\], expected \[4, 32, 48\]"):
        open_checkpoint(folder)
