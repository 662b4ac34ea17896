"""Hunyuan's dense models against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, check_reading, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "plain": {},
    "larger base, tied, biases": {
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 100.0},
    },
    "all heads": {"head_dim": 8, "num_key_value_heads": 4},
}
_HUNYUAN_7B = {
    "add_classification_head": False,
    "architectures": ["HunYuanDenseV1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "bos_token_id": 1,
    "cla_share_factor": 2,
    "class_num": 0,
    "dense_list": [4096, 0],
    "eod_token_id": 127967,
    "eos_token_id": 127960,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "im_end_id": 5,
    "im_newline_id": 11,
    "im_start_id": 4,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mask_init_id": 12,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "model_type": "hunyuan_v1_dense",
    "norm_type": "rms",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "org_vocab_size": 128167,
    "pad_id": 127961,
    "pad_token_id": 127961,
    "pool_type": "last",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "sep_token_id": 127962,
    "text_end_id": 7,
    "text_start_id": 6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_cla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "vocab_size": 128167,
}
_HUNYUAN_2B = {
    **_HUNYUAN_7B,
    "attention_dropout": 0.0,
    "dense_list": [2048, 0],
    "eod_token_id": 120026,
    "eos_token_id": 120020,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "org_vocab_size": 120818,
    "pad_id": 120002,
    "pad_token_id": 120002,
    "sep_token_id": 120007,
    "vocab_size": 120818,
}
PUBLISHED = {
    "Hunyuan-7B-Instruct": (_HUNYUAN_7B, 7_504_568_320),
    "Hunyuan-1.8B-Instruct": (_HUNYUAN_2B, 1_791_080_448),
    "Hunyuan-0.5B-Pretrain": (
        {
            **_HUNYUAN_2B,
            "dense_list": [1024, 0],
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "transformers_version": "4.52.4",
        },
        539_010_048,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "hunyuan_v1_dense", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "hunyuan_v1_dense", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config(tmp_path) -> None:
    folder = save(tmp_path, "hunyuan_v1_dense", **{**TINY, "num_key_value_heads": 4, "head_dim": 8})
    # transformers cannot build the network without a head size.
    gone = ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"]
    cfg = check_reading(edit_config(folder, remove=gone)).cfg
    assert (cfg.n_kv_heads, cfg.norm.eps) == (4, 1e-5)


@pytest.mark.parametrize(("alpha", "base"), [(1000.0, 1e4 * 1000 ** (12 / 10)), (0.0, 1e4), (None, 1e4)])
def test_dynamic_scaling_with_alpha_is_a_larger_base(alpha, base, tmp_path) -> None:
    rope = {"type": "dynamic", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    scaling = {key: value for key, value in rope.items() if alpha or key in ("type", "factor")}
    folder = edit_config(
        save(tmp_path, "hunyuan_v1_dense", **TINY),
        remove=["rope_parameters"],
        rope_theta=1e4,
        rope_scaling=scaling if alpha is None else {**scaling, "alpha": alpha},
    )
    cfg = check_reading(folder).cfg
    assert cfg.positions.base == base
    assert (cfg.positions.scaling is None) == bool(alpha)


@pytest.mark.parametrize("changes", [{"use_qk_norm": False}, {"use_cla": True}, {"num_experts": 8}])
def test_leftovers_that_describe_another_network_are_refused(changes, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "hunyuan_v1_dense", **TINY), **changes)
    with pytest.raises(UnsupportedModelError, match="the only value implemented"):
        open_checkpoint(folder)
