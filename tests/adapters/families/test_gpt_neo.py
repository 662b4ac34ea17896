"""GPT-Neo against transformers, in every variant."""

import pytest

from hooklens.adapters import open_checkpoint
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
    "window_size": 5,
}
VARIANTS = {
    "in turns": {"attention_types": [[["global", "local"], 2]]},
    "global untied": {
        "attention_types": [[["global"], 4]],
        "tie_word_embeddings": False,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-3,
    },
    "several groups": {"attention_types": [[["local"], 1], [["global", "local", "local"], 1]], "num_heads": 4},
}
SMALL = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 6,
    "attention_types": [[["global", "local"], 6]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 12,
    "num_layers": 12,
    "resid_dropout": 0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "transformers_version": "4.9.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
LARGE = {
    **SMALL,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "hidden_size": 2048,
    "num_heads": 16,
    "num_layers": 24,
    "tokenizer_class": "GPT2Tokenizer",
}
PUBLISHED = {
    "gpt-neo-125m": (SMALL, 125_198_592),
    "gpt-neo-1.3B": (LARGE, 1_315_575_808),
    "TinyStories-8M": (
        {
            **SMALL,
            "attention_layers": ["global", "local"] * 4,
            "attention_types": [[["global", "local"], 4]],
            "hidden_size": 256,
            "num_heads": 16,
            "num_layers": 8,
            "torch_dtype": "float32",
        },
        19_702_528,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # Scores are float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "gpt_neo", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gpt_neo", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_layers_see_everything_and_windows_in_turns_where_the_config_is_silent(tmp_path) -> None:
    sizes = {**TINY, "num_layers": 24, "hidden_size": 8, "intermediate_size": 4}
    folder = save(tmp_path, "gpt_neo", **sizes)
    edit_config(folder, remove=["attention_types", "attention_layers", "window_size"])
    assert open_checkpoint(folder).cfg.windows == (None, 256) * 12


def test_the_expanded_list_of_layers_is_ignored_as_in_transformers(tmp_path) -> None:
    folder = save(tmp_path, "gpt_neo", **TINY, attention_types=[[["global", "local"], 2]])
    edit_config(folder, attention_layers=["local"] * 4)
    assert open_checkpoint(folder).cfg.windows == (None, 5, None, 5)


@pytest.mark.parametrize(
    "types",
    [[[["global"], 3]], [[["global", "strided"], 2]], [["global", 4]], [["global", "local"]], [[["global"], -1]]],
)
def test_types_that_give_no_kind_for_each_layer_are_refused(types, tmp_path) -> None:
    folder = save(tmp_path, "gpt_neo", **TINY, attention_types=[[["global", "local"], 2]])
    edit_config(folder, attention_types=types)
    with pytest.raises(UnsupportedModelError, match="attention_types"):
        open_checkpoint(folder)
