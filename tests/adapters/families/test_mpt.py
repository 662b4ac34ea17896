"""MPT against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 40,
}
VARIANTS = {
    "tied": {},
    "clipped": {"attn_config": {"clip_qkv": 0.7}},
    "scaled": {"attn_config": {"softmax_scale": 0.2}, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "heads that are no power of two": {"n_heads": 6, "d_model": 48},
}
SEVEN = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
PUBLISHED = {
    "mpt-7b": (SEVEN, 6_649_286_656),
    "mpt-7b-instruct": (SEVEN, 6_649_286_656),
    "mpt-30b": (
        {**SEVEN, "d_model": 7168, "max_seq_len": 8192, "n_heads": 64, "n_layers": 48},
        29_957_200_896,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # ALiBi and the softmax are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "mpt", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "mpt", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_config": {"alibi": False}},
        {"attn_config": {"alibi_bias_max": 16}},
        {"attn_config": {"attn_type": "multiquery_attention"}},
        {"attn_config": {"attn_uses_sequence_id": True}},
        {"attn_config": {"prefix_lm": True}},
        {"attn_config": {"qk_ln": True}},
        {"expansion_ratio": 8},
        {"logit_scale": "inv_sqrt_d_model"},
        {"no_bias": False},
    ],
)
def test_settings_that_transformers_ignores_are_refused(wrong, tmp_path) -> None:
    """It computes as if they had their usual value, which is another network than the one that was trained."""
    key, value = next(iter(wrong.items()))
    folder = edit_config(save(tmp_path, "mpt", **TINY), **wrong)
    with pytest.raises(
        UnsupportedModelError, match=f"attn_config.{next(iter(value))}" if isinstance(value, dict) else key
    ):
        open_checkpoint(folder)


def test_a_clip_of_zero_is_none_as_in_transformers(tmp_path) -> None:
    folder = edit_config(save(tmp_path, "mpt", **TINY), attn_config={"clip_qkv": 0})
    assert open_checkpoint(folder).cfg.clip_qkv is None
