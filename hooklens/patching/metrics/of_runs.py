"""Metrics of whole predictions: divergence from a reference, and loss.

With `l` the logits at a position and `p = softmax(l)`:

- `KL`: `sum_v r[v] (log r[v] - log p[v])` in nats, with `r` the probabilities of a reference run. It needs no
  answer and is 0 where the patched run predicts as the reference does.
- `Loss`: the mean cross-entropy of the next token in nats.
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.arguments import read_one_of, read_tensor, refusal
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.metric import Cells, Metric, Positions, Runs, Values, check_rows, check_shape
from hooklens.precision import widen

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """The Kullback-Leibler divergence from a reference's predictions to the patched run's, in nats.

    Attributes:
        reference: the clean run, the corrupted run, or logits at the positions read: of one row for all pairs, or of
            one for each. With `pos=None` these are the positions of the longest prompt.

    Raises:
        InputError: another reference; of another shape than what is read, when that is known.
    """

    reference: Literal["clean", "corrupted"] | Float[Tensor, "..."] = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reference, Tensor):
            given = read_tensor(self.reference, what="KL: reference")
            if not given.is_floating_point():
                raise refusal(given, "KL: reference", "logits, which are floating numbers")
        else:
            read_one_of(self.reference, what="KL: reference", options=("clean", "corrupted"))

    def prepare(self, runs: Runs) -> Metric:
        """The metric with the reference's logits."""
        if not isinstance(self.reference, Tensor):
            logits = runs.clean_logits if self.reference == "clean" else runs.corrupted_logits
            return replace(self, reference=logits)
        n_read, d_vocab = runs.clean_logits.shape[1:]
        width = runs.width if self.positions is None else n_read
        check_shape(self.reference, (None, width, d_vocab), "pairs read d_vocab", what="KL: reference")
        given = runs.rows_of(self.reference, what="KL: reference")
        return replace(self, reference=given[:, :n_read].to(runs.clean_logits.device))

    def measure(self, logits: Cells) -> Values:
        """`sum r (log r - log p)`."""
        if not isinstance(self.reference, Tensor):
            raise MetricError("KL was not prepared: give logits as reference to use it outside a sweep")
        check_shape(self.reference, (None, *logits.shape[2:]), "pairs read d_vocab", what="KL: reference")
        check_rows(len(self.reference), logits.shape[1], what="KL: reference")
        reference = widen(self.reference).log_softmax(-1)
        patched = widen(logits).log_softmax(-1)
        return self.average((reference.exp() * (reference - patched)).sum(-1))


@dataclass(frozen=True, eq=False)
class Loss(Metric):
    """The mean cross-entropy of each next token of a prompt, in nats.

    Attributes:
        tokens: the ids whose next tokens count: `"own"`: those that a run reads, so the clean run is scored on the
            clean prompt, the corrupted run on the corrupted one, and a patched run on the prompt that it patches
            (corrupted with `direction="denoise"`, clean with `"noise"`); `"clean"` or `"corrupted"`: those of one
            prompt for all runs, which puts them on one scale; or ids `[pairs pos]`, of one row for all pairs or of
            one for each, for all runs.

    Raises:
        InputError: other tokens, or positions, of which all are read.
    """

    _: KW_ONLY
    pos: Positions = None
    tokens: Literal["own", "clean", "corrupted"] | Int[Tensor, "..."] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pos is not None:
            raise InputError(f"Loss reads all positions; pos={self.pos!r} cannot be chosen")
        if isinstance(self.tokens, Tensor):
            given = read_tensor(self.tokens, what="Loss: tokens")
            if not tokenization.is_integer(given):
                raise refusal(given, "Loss: tokens", "token ids, which are whole numbers")
        else:
            read_one_of(self.tokens, what="Loss: tokens", options=("own", "clean", "corrupted"))

    def prepare(self, runs: Runs) -> Metric:
        """The metric with the tokens of the run; padding does not count."""
        refuse_other_outputs(runs.model.cfg, "Loss", InputError)
        if isinstance(self.tokens, Tensor):
            check_shape(self.tokens, (None, runs.width), "pairs pos", what="Loss: tokens")
            given = runs.rows_of(self.tokens, what="Loss: tokens").to(runs.tokens.device)
            tokens = given[:, : runs.tokens.shape[1]].expand_as(runs.tokens)
        else:
            tokens = {"own": runs.tokens, "clean": runs.clean_tokens, "corrupted": runs.corrupted_tokens}[self.tokens]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = torch.tensor(runs.lengths, device=tokens.device)
        counted = tokens.long().masked_fill(columns >= lengths[:, None], _IGNORED)
        _check_ids(counted, runs.clean_logits.shape[-1])
        return replace(self, tokens=counted)

    def measure(self, logits: Cells) -> Values:
        """The mean over a prompt's pairs of neighbouring tokens."""
        if not isinstance(self.tokens, Tensor):
            raise MetricError("Loss was not prepared: give tokens to use it outside a sweep")
        check_shape(self.tokens, (None, logits.shape[2]), "pairs pos", what="Loss: tokens")
        check_rows(len(self.tokens), logits.shape[1], what="Loss: tokens")
        _check_ids(self.tokens, logits.shape[-1])
        targets = self.tokens.long().to(logits.device)[None, :, 1:].expand(*logits.shape[:2], -1)
        losses = F.cross_entropy(widen(logits[:, :, :-1]).flatten(0, 2), targets.flatten(), reduction="none")
        return losses.view(targets.shape).sum(-1) / (targets != _IGNORED).sum(-1)


def _check_ids(tokens: Tensor, d_vocab: int) -> None:
    outside = sorted(set(tokens[((tokens < 0) & (tokens != _IGNORED)) | (tokens >= d_vocab)].tolist()))
    if outside:
        raise InputError(f"Loss: token ids {outside[:10]} are outside the vocabulary, 0 to {d_vocab - 1}")
