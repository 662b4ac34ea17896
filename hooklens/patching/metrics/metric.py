"""Metrics: what a patched run is judged by, as values.

A metric reads the logits at some positions and gives one number per prompt. With `l` the logits at a position
and `p = softmax(l)`:

- `LogitDiff`: `l[answer] - l[wrong]`, the usual choice: it is linear in the stream after the final norm, and
  what raises both answers alike cancels (Wang et al. 2022, "Interpretability in the Wild").
- `LogProb`: `log p[answer]` in nats; `Probability`: `p[answer]`; `Accuracy`: 1 where the answer has the largest
  logit, else 0.
- `KL`: `sum_v r[v] (log r[v] - log p[v])` in nats, with `r` the probabilities of a reference run. It needs no
  answer and is 0 where the patched run predicts as the reference does.
- `Loss`: the mean cross-entropy of the next token in nats.
- `FractionRecovered`: another metric, scaled so that the corrupted run is 0 and the clean run 1.

Any function from logits `[batch pos d_vocab]` to values `[batch]` is a metric, too (`function_metric`); it is given
the logits at all positions, so a metric that says which positions it reads is cheaper.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.answers import Tokens, encode_tokens, ids_of_pairs, list_tokens
from hooklens.precision import wide_dtype, widen

Positions = int | Sequence[int] | None

Cells = Float[Tensor, "cells pairs read d_vocab"]
Values = Float[Tensor, "cells pairs"]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The two unpatched runs of some pairs, from which a metric takes what it compares with.

    Attributes:
        model: the model.
        pairs: which pairs of the experiment these are.
        n_pairs: how many pairs the experiment has.
        tokens: ids of the run that is patched, `[pairs pos]`, padded on the right.
        lengths: tokens of each pair.
        clean_logits: at the positions the metric reads.
        corrupted_logits: the same of the corrupted run.
    """

    model: HookedCausalLM
    pairs: tuple[int, ...]
    n_pairs: int
    tokens: Int[Tensor, "pairs pos"]
    lengths: tuple[int, ...]
    clean_logits: Float[Tensor, "pairs read d_vocab"]
    corrupted_logits: Float[Tensor, "pairs read d_vocab"]


@dataclass(frozen=True, eq=False)
class Metric(ABC):
    """Base of all metrics; a new kind defines `measure`, and `prepare` if it compares with something.

    Attributes:
        pos: the positions read, among a prompt's real tokens; negative ones count from its end; None: all.
            With several positions the metric is their mean.
        real: of prompts of different length, which columns are tokens and not padding; None: all.
        needs_all_pairs: the metric cannot be measured for some of the pairs alone.
    """

    needs_all_pairs: ClassVar[bool] = False

    _: KW_ONLY
    pos: Positions = -1
    real: Bool[Tensor, "pairs read"] | None = field(default=None, repr=False)

    @property
    def positions(self) -> list[int] | None:
        """The positions read, as a list; None: all."""
        if self.pos is None:
            return None
        return [self.pos] if isinstance(self.pos, int) else list(self.pos)

    @property
    def name(self) -> str:
        """What a table or plot calls the metric."""
        return type(self).__name__

    def prepare(self, runs: Runs) -> "Metric":
        """The metric for some pairs, with token ids and references filled in.

        Raises:
            InputError: an answer that is no single token, outside the vocabulary, or not one per pair.
        """
        return self

    def average(self, values: Float[Tensor, "cells pairs read"]) -> Values:
        """The mean over the positions read, padding left out."""
        if self.real is None:
            return values.mean(-1)
        return values.masked_fill(~self.real, 0.0).sum(-1) / self.real.sum(-1)

    def encode(self, model: HookedCausalLM) -> "Metric":
        """The metric with texts replaced by the model's token ids, for calls on logits outside a sweep.

        Raises:
            InputError: a text that is no single token.
        """
        return self

    @abstractmethod
    def measure(self, logits: Cells) -> Values:
        """The values of patched runs, from the logits at the positions read. The metric must be prepared."""

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The values of a batch of unpadded prompts, from their logits at all positions."""
        chosen = logits if self.positions is None else logits[:, self.positions]
        return self.measure(chosen[None])[0]


@dataclass(frozen=True, eq=False)
class _OfAnswer(Metric):
    """A metric of one answer per prompt.

    Attributes:
        answer: the token, as an id or as a text that is a single token: one for all pairs, or one per pair.
    """

    answer: Tokens

    def prepare(self, runs: Runs) -> "Metric":
        """The metric with the answers' ids."""
        return replace(
            self, answer=ids_of_pairs(runs.model, self.answer, runs.pairs, runs.n_pairs, f"{self.name}: answer")
        )

    def encode(self, model: HookedCausalLM) -> "Metric":
        """The metric with the answers' ids."""
        return replace(self, answer=torch.tensor(encode_tokens(model, self.answer)))

    def _ids(self, tokens: Tokens, logits: Cells) -> Int[Tensor, "_ _ _"]:
        """Ids of answers, one for all pairs or one for each."""
        given = list_tokens(tokens)
        texts = [token for token in given if isinstance(token, str)]
        if texts:
            raise MetricError(
                f"{self.name}: {texts[0]!r} is text, whose token id logits do not tell; call metric.encode(model) first"
            )
        ids = torch.tensor(given, device=logits.device).reshape(1, -1, 1)
        if ids.shape[1] not in (1, logits.shape[1]):
            raise MetricError(
                f"{self.name}: {ids.shape[1]} tokens for {logits.shape[1]} rows of logits; expected 1 or one for each"
            )
        return ids

    def _read(self, values: Cells, tokens: Tokens) -> Float[Tensor, "cells pairs read"]:
        ids = self._ids(tokens, values)[..., None]
        return values.take_along_dim(ids.expand(len(values), values.shape[1], values.shape[2], 1), -1)[..., 0]


@dataclass(frozen=True, eq=False)
class LogitDiff(_OfAnswer):
    """The answer's logit minus the wrong answer's.

    Attributes:
        wrong: the other token, like `answer`.

    Example:
        `LogitDiff(" Mary", " John")` at the last position.
    """

    wrong: Tokens

    def prepare(self, runs: Runs) -> "Metric":
        """The metric with the ids of both answers."""
        answer = ids_of_pairs(runs.model, self.answer, runs.pairs, runs.n_pairs, f"{self.name}: answer")
        return replace(
            self,
            answer=answer,
            wrong=ids_of_pairs(runs.model, self.wrong, runs.pairs, runs.n_pairs, f"{self.name}: wrong"),
        )

    def encode(self, model: HookedCausalLM) -> "Metric":
        """The metric with the ids of both answers."""
        answer, wrong = (torch.tensor(encode_tokens(model, tokens)) for tokens in (self.answer, self.wrong))
        return replace(self, answer=answer, wrong=wrong)

    def measure(self, logits: Cells) -> Values:
        """`l[answer] - l[wrong]`."""
        return self.average(self._read(logits, self.answer) - self._read(logits, self.wrong))


@dataclass(frozen=True, eq=False)
class LogProb(_OfAnswer):
    """The log-probability of the answer, in nats."""

    def measure(self, logits: Cells) -> Values:
        """`log p[answer]`."""
        return self.average(self._read(logits, self.answer) - widen(logits).logsumexp(-1))


@dataclass(frozen=True, eq=False)
class Probability(_OfAnswer):
    """The probability of the answer."""

    def measure(self, logits: Cells) -> Values:
        """`p[answer]`."""
        return self.average((self._read(logits, self.answer) - widen(logits).logsumexp(-1)).exp())


@dataclass(frozen=True, eq=False)
class Accuracy(_OfAnswer):
    """1 where the answer has the largest logit, else 0."""

    def measure(self, logits: Cells) -> Values:
        """Whether the answer comes first."""
        ids = self._ids(self.answer, logits)
        return self.average((logits.argmax(-1) == ids).to(wide_dtype(logits.dtype)))


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """The Kullback-Leibler divergence from a reference's predictions to the patched run's, in nats.

    Attributes:
        reference: the clean run, the corrupted run, or logits `[pairs read d_vocab]` at the positions read.
    """

    reference: Literal["clean", "corrupted"] | Float[Tensor, "pairs read d_vocab"] = "clean"

    def prepare(self, runs: Runs) -> "Metric":
        """The metric with the reference's logits."""
        if isinstance(self.reference, Tensor):
            if self.reference.shape[0] not in (1, runs.n_pairs):
                raise InputError(
                    f"KL: the reference has {self.reference.shape[0]} rows; expected 1 or one per pair ({runs.n_pairs})"
                )
            one = self.reference.shape[0] == 1
            return self if one else replace(self, reference=self.reference[list(runs.pairs)])
        if self.reference not in ("clean", "corrupted"):
            raise InputError(f"KL: reference is {self.reference!r}; expected 'clean', 'corrupted' or logits")
        logits = runs.clean_logits if self.reference == "clean" else runs.corrupted_logits
        return replace(self, reference=logits)

    def measure(self, logits: Cells) -> Values:
        """`sum r (log r - log p)`."""
        if not isinstance(self.reference, Tensor):
            raise MetricError("KL was not prepared: give logits as reference to use it outside a sweep")
        reference = widen(self.reference).log_softmax(-1)
        patched = widen(logits).log_softmax(-1)
        return self.average((reference.exp() * (reference - patched)).sum(-1))


@dataclass(frozen=True, eq=False)
class Loss(Metric):
    """The mean cross-entropy of each next token of the prompt, in nats.

    Attributes:
        tokens: the ids whose next tokens count, `[pairs pos]`; None: those of the run that is patched.
    """

    _: KW_ONLY
    pos: Positions = None
    tokens: Int[Tensor, "pairs pos"] | None = None

    def prepare(self, runs: Runs) -> "Metric":
        """The metric with the tokens of the run; padding does not count."""
        if self.pos is not None:
            raise InputError(f"Loss reads all positions; pos={self.pos!r} cannot be chosen")
        tokens = runs.tokens if self.tokens is None else self.tokens.to(runs.tokens.device)[list(runs.pairs)]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = torch.tensor(runs.lengths, device=tokens.device)
        return replace(self, tokens=tokens.masked_fill(columns >= lengths[:, None], -100))

    def measure(self, logits: Cells) -> Values:
        """The mean over a prompt's pairs of neighbouring tokens."""
        if self.tokens is None:
            raise MetricError("Loss was not prepared: give tokens to use it outside a sweep")
        targets = self.tokens[None, :, 1:].expand(len(logits), -1, -1)
        losses = F.cross_entropy(widen(logits[:, :, :-1]).flatten(0, 2), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape)
        return losses.sum(-1) / (targets >= 0).sum(-1)


@dataclass(frozen=True, eq=False)
class FractionRecovered(Metric):
    """Another metric on a scale where the corrupted run is 0 and the clean run 1.

    Attributes:
        metric: what is scaled; its positions are read.
        ends: its values in the corrupted and the clean run, `[pairs]` each; None: taken from the runs.
    """

    metric: Metric
    ends: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]] | None = None

    @property
    def positions(self) -> list[int] | None:
        """The inner metric's."""
        return self.metric.positions

    @property
    def name(self) -> str:
        """The inner metric's name, said to be scaled."""
        return f"FractionRecovered({self.metric.name})"

    def prepare(self, runs: Runs) -> "Metric":
        """The metric with its values in both runs.

        Raises:
            InputError: a pair's two runs have the same value, so there is nothing to recover.
        """
        inner = prepare_metric(self.metric, runs)
        ends = inner.measure(torch.stack([runs.corrupted_logits, runs.clean_logits]))
        same = [pair for pair, (low, high) in zip(runs.pairs, ends.T.tolist(), strict=True) if low == high]
        if same:
            raise InputError(
                f"{self.name}: the clean and the corrupted run of pairs {same} have the same value, so no fraction of "
                "their difference exists; choose prompts that differ in the metric"
            )
        return replace(self, metric=inner, ends=(ends[0], ends[1]))

    def encode(self, model: HookedCausalLM) -> "Metric":
        """The metric with the inner one encoded."""
        return replace(self, metric=self.metric.encode(model))

    def measure(self, logits: Cells) -> Values:
        """`(m - m_corrupted) / (m_clean - m_corrupted)`."""
        if self.ends is None:
            raise MetricError("FractionRecovered was not prepared: give ends to use it outside a sweep")
        corrupted, clean = self.ends
        return (self.metric.measure(logits) - corrupted) / (clean - corrupted)


def prepare_metric(metric: Metric, runs: Runs) -> Metric:
    """The metric for some pairs, with token ids, references and padding filled in.

    Raises:
        InputError: see `Metric.prepare`.
    """
    prepared = metric.prepare(runs)
    if prepared.positions is not None or len(set(runs.lengths)) == 1:
        return prepared
    columns = torch.arange(runs.tokens.shape[1], device=runs.tokens.device)
    return replace(prepared, real=columns < torch.tensor(runs.lengths, device=columns.device)[:, None])
