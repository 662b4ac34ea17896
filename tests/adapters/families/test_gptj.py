"""GPT-J against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.config import RotaryPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 56,
    "n_positions": 40,
    "rotary_dim": 6,
}
VARIANTS = {
    "part of a head": {},
    "whole heads": {"rotary_dim": 16, "n_inner": None, "layer_norm_epsilon": 1e-3},
    "other activation": {"activation_function": "relu", "n_head": 4},
    "tied": {"tie_word_embeddings": True},
}
EARLY = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "transformers_version": "4.16.0.dev0",
    "use_cache": True,
    "vocab_size": 50400,
}
# There is one size; fine-tunes repeat its config.
PUBLISHED = {
    "gpt-j-6b, at first": (EARLY, 6_050_882_784),
    "gpt-j-6b": (
        {
            **EARLY,
            "gradient_checkpointing": False,
            "n_inner": None,
            "scale_attn_weights": True,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
            "tokenizer_class": "GPT2Tokenizer",
            "transformers_version": "4.18.0.dev0",
        },
        6_050_882_784,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # Scores and rotary tables are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "gptj", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gptj", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_rotary_is_of_neighbours_and_has_no_setting_but_its_width(tmp_path) -> None:
    folder = save(tmp_path, "gptj", **TINY)
    assert open_checkpoint(folder).cfg.positions == RotaryPositions(dim=6, layout="interleaved")
    # transformers reads neither key.
    edit_config(folder, rope_theta=1e6)
    with pytest.warns(UserWarning, match=r"does not know: 'rope_theta'"):
        assert open_checkpoint(folder).cfg.positions == RotaryPositions(dim=6, layout="interleaved")


@pytest.mark.parametrize(
    "wrong",
    [{"rotary": False}, {"scale_attn_weights": False}, {"rotary_dim": None}],
)
def test_settings_that_nobody_computes_are_refused(wrong, tmp_path) -> None:
    folder = edit_config(save(tmp_path, "gptj", **TINY), **wrong)
    with pytest.raises(UnsupportedModelError, match=next(iter(wrong))):
        open_checkpoint(folder)
