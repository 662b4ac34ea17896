"""BioGPT against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 1e-3},
    "unscaled": {"scale_embedding": False},
}
SMALL = {
    "activation_dropout": 0.0,
    "architectures": ["BioGptForCausalLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-12,
    "layerdrop": 0.0,
    "max_position_embeddings": 1024,
    "model_type": "biogpt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "scale_embedding": True,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "use_cache": True,
    "vocab_size": 42384,
}
LARGE = {
    **SMALL,
    "hidden_size": 1600,
    "intermediate_size": 6400,
    "max_position_embeddings": 2048,
    "num_attention_heads": 25,
    "num_hidden_layers": 48,
    "torch_dtype": "float32",
    "vocab_size": 57717,
}
PUBLISHED = {
    "biogpt": ({key: value for key, value in SMALL.items() if key != "torch_dtype"}, 346_763_264),
    "BioGPT-Large": (LARGE, 1_571_188_800),
    "BioGPT-Large-PubMedQA": ({**LARGE, "vocab_size": 57726}, 1_571_203_200),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "biogpt", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "biogpt", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])
