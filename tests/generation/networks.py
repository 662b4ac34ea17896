"""Small models for the tests of generation."""

from functools import cache

import torch
from transformers import PreTrainedModel

from hooklens import HookedCausalLM, HookedConfig, RotaryPositions
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.bundled.words import VOCABULARY
from tests.checkpoints import build_variant


@cache
def pair(name: str = "llama-gqa") -> tuple[HookedCausalLM, PreTrainedModel]:
    """A variant twice: ours and transformers'."""
    hf_model = build_variant(name)
    return HookedCausalLM.from_hf(hf_model), hf_model


@cache
def reader() -> HookedCausalLM:
    """A random model with the word-level tokenizer of the bundled checkpoints."""
    cfg = HookedConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_vocab=len(VOCABULARY),
        n_ctx=64,
        positions=RotaryPositions(dim=8),
        init_std=0.5,
    )
    model = HookedCausalLM(cfg, tokenizer=build_tokenizer(n_ctx=64))
    model.initialize(seed=0)
    return model


def left_pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as ids and mask `[batch pos]`, padding (id 0) on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class PadsWithZero:
    """The least a tokenizer must be for ids: says that 0 is padding, and encodes nothing."""

    pad_token_id = 0
    bos_token_id = None
    eos_token_id = None
    padding_side = "left"

    def __call__(self, text, **options):
        raise AssertionError("no text in these tests")

    def __len__(self):
        return 97

    def decode(self, token_ids, **options):
        return " ".join(map(str, token_ids))
