"""Small models for the tests of evaluation, and the scores they have to reproduce."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.hooks.edits import Edit
from tests.word_models import make_word_model

N_CTX = 48
PREFIX = "When Mary and John went to the store ,"


@cache
def reader() -> HookedCausalLM:
    """A random float64 model with the word-level tokenizer of the bundled checkpoints."""
    return make_word_model(d_model=16, n_ctx=N_CTX, init_std=0.6).double()


@torch.no_grad()
def score_alone(
    model: HookedCausalLM, prefix: Sequence[int], row: Sequence[int], edits: Sequence[Edit] = ()
) -> list[float]:
    """The log-probabilities of a continuation's tokens, from one run of the full sequence."""
    tokens = torch.tensor([[*prefix, *row]])
    logits = model.run_with_hooks(tokens, edits=edits, attention_mask=torch.ones_like(tokens))
    logprobs = logits.log_softmax(-1)[0, len(prefix) - 1 : -1]
    return [float(logprobs[i, token]) for i, token in enumerate(row)]


def draw_row(n: int, *, seed: int, d_vocab: int = 23) -> list[int]:
    ids: Tensor = torch.randint(1, d_vocab, (n,), generator=torch.Generator().manual_seed(seed))
    return ids.tolist()
