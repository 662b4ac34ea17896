"""GPT-2 against transformers, in every variant."""

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.config import HookedConfig, LearnedPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder
from tests.checkpoints import edit_config, load_apart

TINY = {
    "vocab_size": D_VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 56,
    "n_positions": 40,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "n_inner": None, "layer_norm_epsilon": 1e-3},
    "unscaled": {"scale_attn_weights": False, "activation_function": "relu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "scaled by layer only": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
}
OPENAI = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
SINCE = ("activation_function", "bos_token_id", "eos_token_id", "model_type", "task_specific_params")
PUBLISHED = {
    "gpt2": (OPENAI, 124_439_808),
    "gpt2-xl": (
        {**OPENAI, "n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
        1_557_611_200,
    ),
    "distilgpt2": (
        {
            **OPENAI,
            "_num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "n_layer": 6,
        },
        81_912_576,
    ),
    "distilgpt2, as first released": (
        {
            **{key: value for key, value in OPENAI.items() if key not in SINCE},
            "finetuning_task": None,
            "n_layer": 6,
            "num_labels": 1,
            "output_attentions": False,
            "output_hidden_states": False,
            "pruned_heads": {},
            "torchscript": False,
            "use_bfloat16": False,
        },
        81_912_576,
    ),
    "stanford-crfm/BioMedLM": (
        {
            **OPENAI,
            "bos_token_id": 28895,
            "eos_token_id": 28895,
            "n_embd": 2560,
            "n_head": 20,
            "n_inner": None,
            "n_layer": 32,
            "pad_token_id": 28895,
            "reorder_and_upcast_attn": False,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": True,
            "use_cache": False,
            "vocab_size": 28896,
        },
        2_594_247_680,
    ),
    "stanford-crfm/alias-gpt2-small-x21": (
        {
            **OPENAI,
            "gradient_checkpointing": False,
            "n_inner": None,
            "reorder_and_upcast_attn": True,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": True,
            "torch_dtype": "float32",
            "transformers_version": "4.8.1",
            "use_cache": False,
        },
        124_439_808,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "gpt2", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gpt2", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_files_of_the_base_model_with_masks_are_read(tmp_path) -> None:
    """OpenAI's files: no prefix, no head, and two buffers of masks in each layer."""
    folder = save(tmp_path, "gpt2", **TINY)
    expected = dict(HookedCausalLM.from_pretrained(folder).state_dict())
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_apart(folder / "model.safetensors").items()
    }
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 40, 40))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    found = HookedCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_long_spelling_of_sizes_wins_as_in_transformers(tmp_path) -> None:
    from transformers import AutoConfig

    folder = edit_config(
        save(tmp_path, "gpt2", **TINY), hidden_size=32, max_position_embeddings=40, n_embd=16, n_positions=24
    )
    config = AutoConfig.from_pretrained(folder)
    assert (open_checkpoint(folder).cfg.d_model, open_checkpoint(folder).cfg.n_ctx) == (32, 40)
    assert (config.n_embd, config.n_positions) == (32, 40)


def test_a_scale_of_another_kind_cannot_be_written() -> None:
    from hooklens.adapters.families.gpt2 import FAMILY

    cfg = HookedConfig(
        d_model=8, n_layers=2, n_heads=2, d_vocab=5, n_ctx=4, act_fn="gelu_new", positions=LearnedPositions(),
        attn_scale=0.3, tied_unembed=True,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"attn_scale=0.3"):
        FAMILY.write_config(cfg)
    assert FAMILY.inexpressible_fields(cfg.replace(attn_scale=(1.0, 0.5))) == []
    assert FAMILY.inexpressible_fields(cfg.replace(attn_scale=(0.5, 1.0))) == ["attn_scale"]
