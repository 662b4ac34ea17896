"""BLOOM against transformers, in every variant."""

import pytest
from transformers import AutoConfig

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "seq_length": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "heads that are no power of two": {"n_head": 6, "hidden_size": 48},
}
SMALL = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "transformers_version": "4.20.0",
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
PUBLISHED = {
    "bloom-560m": (SMALL, 559_214_592),
    "bloom-7b1": (
        {**SMALL, "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "slow_but_exact": False},
        7_069_016_064,
    ),
    "bloom": (
        {
            **SMALL,
            "n_embed": 14336,
            "n_layer": 70,
            "num_attention_heads": 112,
            "pretraining_tp": 4,
            "slow_but_exact": False,
        },
        176_247_271_424,
    ),
    "bloomz-560m": (
        {key: value for key, value in SMALL.items() if key not in ("n_embed", "num_attention_heads")}
        | {"hidden_size": 1024, "n_head": 16, "slow_but_exact": False},
        559_214_592,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # ALiBi and the softmax are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "bloom", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "bloom", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_the_old_spelling_of_the_width_wins_as_in_transformers(tmp_path) -> None:
    folder = save(tmp_path, "bloom", **TINY)
    edit_config(folder, n_embed=32, hidden_size=64, num_attention_heads=2)
    cfg, theirs = open_checkpoint(folder).cfg, AutoConfig.from_pretrained(folder)
    assert (cfg.d_model, cfg.n_heads) == (theirs.hidden_size, theirs.n_head) == (32, 2)


def test_norms_that_the_stream_goes_on_from_are_refused(tmp_path) -> None:
    folder = edit_config(save(tmp_path, "bloom", **TINY), apply_residual_connection_post_layernorm=True)
    with pytest.raises(UnsupportedModelError, match="apply_residual_connection_post_layernorm"):
        open_checkpoint(folder)
