"""XGLM against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "d_model": 32,
    "num_layers": 3,
    "attention_heads": 4,
    "ffn_dim": 56,
    "max_position_embeddings": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "activation_function": "relu"},
    "unscaled": {"scale_embedding": False},
}
SMALL = {
    "activation_dropout": 0,
    "activation_function": "gelu",
    "architectures": ["XGLMForCausalLM"],
    "attention_dropout": 0.1,
    "attention_heads": 16,
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "xglm",
    "num_layers": 24,
    "pad_token_id": 1,
    "scale_embedding": True,
    "transformers_version": "4.16.0.dev0",
    "use_cache": True,
    "vocab_size": 256008,
}
PUBLISHED = {
    "xglm-564M": (SMALL, 564_463_616),
    "xglm-1.7B": ({**SMALL, "d_model": 2048, "ffn_dim": 8192}, 1_732_907_008),
    "xglm-7.5B": (
        {**SMALL, "attention_heads": 32, "d_model": 4096, "ffn_dim": 16384, "num_layers": 32},
        7_492_771_840,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "xglm", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "xglm", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])
