"""Small models for the tests of generation."""

from functools import cache

import torch
from transformers import PreTrainedModel

from hooklens import HookedCausalLM
from tests.checkpoints import build_variant
from tests.word_models import make_word_model

RAGGED = [[5, 17, 80, 3, 44, 9], [61, 2, 33], [12, 90, 7, 25, 31]]


@cache
def pair(name: str = "llama-gqa") -> tuple[HookedCausalLM, PreTrainedModel]:
    """A variant twice: ours and transformers'."""
    hf_model = build_variant(name)
    model = HookedCausalLM.from_hf(hf_model)
    # Rows end where a test says so.
    model.generation_config = {}
    return model, hf_model


@cache
def reader() -> HookedCausalLM:
    """A random model with the word-level tokenizer of the bundled checkpoints."""
    return make_word_model(d_model=32, n_ctx=64, init_std=0.5)


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


def with_padding_id(model):
    padded = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg)
    padded.tokenizer = PadsWithZero()
    return padded


def greedy_loop(model, row, n):
    """Most likely tokens by one full forward without a cache for each."""
    row = list(row)
    for _ in range(n):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row
