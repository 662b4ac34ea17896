"""Choosing tokens: the most likely one, or a draw whose randomness belongs to the row."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scores = Float[Tensor, "batch d_vocab"]

# Uniform numbers are drawn this many steps at a time, for each row from its own generator.
_BLOCK = 64


class RowDraws:
    """A stream of uniform numbers for each row of a batch.

    A row's stream depends on the seed and on its place in the batch only: more rows, longer generations and
    rows that finish do not change it.

    Args:
        n_rows: rows of the batch.
        seed: None takes one from torch's global generator, so that `torch.manual_seed` decides.
        device: where the numbers are needed.
    """

    def __init__(self, n_rows: int, seed: int | None, device: torch.device) -> None:
        master = torch.Generator()
        master.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self._generators = [
            torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=master))) for _ in range(n_rows)
        ]
        self._device = device
        self._block = torch.empty(n_rows, 0)
        self._next = 0

    def draw(self) -> Float[Tensor, " rows"]:
        """The next number in [0, 1) of every row, float64."""
        if self._next == self._block.shape[1]:
            blocks = [torch.rand(_BLOCK, dtype=torch.float64, generator=own) for own in self._generators]
            self._block = torch.stack(blocks).to(self._device)
            self._next = 0
        numbers = self._block[:, self._next]
        self._next += 1
        return numbers


def sample_tokens(scores: Scores, uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw from the softmax of the scores by inverting its cumulative distribution.

    Args:
        scores: processed logits; -inf is never drawn.
        uniform: one number in [0, 1) for each row.
    """
    # float64: the sums over a large vocabulary stay exact far below the smallest probability that matters.
    cumulative = torch.softmax(scores, -1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    # The product may round up to the total, which lies behind every token.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def likeliest_tokens(logits: Scores, k: int) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """Each row's `k` likeliest tokens (all, where there are fewer) and their log-probabilities in nats."""
    found = logits.topk(min(k, logits.shape[-1]))
    return found.indices, found.values - logits.logsumexp(-1, keepdim=True)


def token_log_probs(logits: Scores, tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The log-probability of each row's token in nats."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return chosen - logits.logsumexp(-1)
