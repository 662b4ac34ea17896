"""CodeGen against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 8,
    "n_inner": 56,
    "n_positions": 40,
    "rotary_dim": 4,
}
VARIANTS = {
    "two heads a block": {},
    "one head a block": {"n_head": 4, "n_inner": None, "layer_norm_epsilon": 1e-3, "rotary_dim": 12},
    "tied": {"tie_word_embeddings": True},
}
SMALL = {
    "activation_function": "gelu_new",
    "architectures": ["CodeGenForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "codegen",
    "n_ctx": 2048,
    "n_embd": 1024,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 20,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary_dim": 32,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 51200,
}
PUBLISHED = {
    "codegen-350M-mono": (SMALL, 356_712_448),
    "codegen-2B-mono": ({**SMALL, "n_embd": 2560, "n_head": 32, "n_layer": 32, "rotary_dim": 64}, 2_779_356_160),
    "codegen-6B-mono": ({**SMALL, "n_embd": 4096, "n_layer": 33, "rotary_dim": 64}, 7_064_213_504),
    "codegen-16B-mono": ({**SMALL, "n_embd": 6144, "n_head": 24, "n_layer": 34, "rotary_dim": 64}, 16_032_155_648),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # Scores and rotary tables are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "codegen", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "codegen", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_heads_that_do_not_lie_in_four_blocks_are_refused(tmp_path) -> None:
    folder = edit_config(save(tmp_path, "codegen", **TINY), n_head=6)
    with pytest.raises(UnsupportedModelError, match="n_head is 6; expected a multiple of 4"):
        open_checkpoint(folder)
