"""GPT against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "afn": "relu", "layer_norm_epsilon": 1e-3},
    "silu": {"afn": "silu"},
}
OPENAI = {
    "afn": "gelu",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "openai-gpt",
    "n_ctx": 512,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 512,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 40478,
}
SAVED_AGAIN = {
    **OPENAI,
    "_name_or_path": "openai-gpt",
    "torch_dtype": "float32",
    "transformers_version": "4.12.5",
}
PUBLISHED = {
    "openai-gpt": (OPENAI, 116_534_784),
    "gpt1-modest-proposal": (SAVED_AGAIN, 116_534_784),
    "instruct-generalize/gpt-1": ({**SAVED_AGAIN, "transformers_version": "4.30.2"}, 116_534_784),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "openai-gpt", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "openai-gpt", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_gelu_means_the_tanh_approximation(tmp_path) -> None:
    assert open_checkpoint(save(tmp_path, "openai-gpt", **TINY)).cfg.act_fn == "gelu_tanh"
