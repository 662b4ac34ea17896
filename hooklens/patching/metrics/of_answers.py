"""Metrics of answers: logit difference, log-probability, probability, accuracy.

With `l` the logits at a position, `p = softmax(l)`, `A` the answers of a pair and `W` its wrong answers:

- `LogitDiff`: `l[a] - l[w]`, the usual choice: it is linear in the stream after the final norm, and what raises both
  answers alike cancels (Wang et al. 2022, "Interpretability in the Wild").
- `LogProb`: `log p[a]` in nats; `Probability`: `p[a]`; `Accuracy`: 1 where an answer has the largest logit, else 0.

Where a pair has several answers, `over` says what they count as:

| `over` | `LogitDiff` | `LogProb` | `Probability` |
|---|---|---|---|
| `"mean"`: the mean over the answers | `mean_A l - mean_W l` | `mean_A log p` | `mean_A p` |
| `"logsumexp"`: one event, that any of them comes | `log sum_A exp l - log sum_W exp l` | `log sum_A p` | `sum_A p` |

so `"logsumexp"` gives the log-odds between the two groups, the log-probability and the probability of a group.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_one_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.metric import Cells, Metric, Runs, Values
from hooklens.patching.pairs.answers import Answers, Tokens, encode_answers, ids_as_given, list_answers
from hooklens.precision import widen

Over = Literal["mean", "logsumexp"]
ByAnswer = Float[Tensor, "cells pairs read answers"]


@dataclass(frozen=True, eq=False)
class OfAnswers(Metric):
    """Base of the metrics that read answers.

    Attributes:
        answer: a token as an id or as a text that is a single token, or several: see
            `hooklens.patching.pairs.answers`. None: each pair brings its own, `Pair(..., answer=)`.

    Raises:
        InputError: no tokens.
    """

    given: ClassVar[tuple[str, ...]] = ("answer",)
    """The attributes that hold answers."""

    answer: Tokens | Answers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in self.given:
            tokens = getattr(self, field)
            if tokens is not None and not isinstance(tokens, Answers):
                list_answers(tokens, what=f"{self.name}: {field}")

    def prepare(self, runs: Runs) -> Metric:
        """The metric with the answers' ids."""
        filled: dict[str, Any] = {field: self._answers_of(field, runs) for field in self.given}
        return replace(self, **filled)

    def encode(self, model: HookedCausalLM) -> Metric:
        """The metric with the answers' ids; those that pairs bring along stay with them."""
        tokens = {field: getattr(self, field) for field in self.given}
        encoded: dict[str, Any] = {
            field: None if one is None else encode_answers(model, one, what=f"{self.name}: {field}")
            for field, one in tokens.items()
        }
        return replace(self, **encoded)

    def read(self, logits: Cells, field: str) -> ByAnswer:
        """The logits of one attribute's answers, at least in float32."""
        return widen(self._ids(field).read(logits, what=f"{self.name}: {field}"))

    def _ids(self, field: str) -> Answers:
        tokens = getattr(self, field)
        if tokens is None:
            raise MetricError(
                f"{self.name} was not prepared: give {field} to use it outside an experiment whose pairs bring it along"
            )
        return ids_as_given(tokens, what=f"{self.name}: {field}")

    def _answers_of(self, field: str, runs: Runs) -> Answers:
        what, tokens = f"{self.name}: {field}", getattr(self, field)
        if tokens is not None:
            return encode_answers(runs.model, tokens, what=what).of_pairs(runs.pairs, runs.n_pairs, what=what)
        own = runs.answers if field == "answer" else runs.wrongs
        if own is None:
            raise InputError(
                f"{what} is not given, and the pairs bring none along; write {self.name}({field}=...), or "
                f"Pair(clean, corrupted, {field}=...) for every pair"
            )
        return own


@dataclass(frozen=True, eq=False)
class OfGroups(OfAnswers):
    """Base of the metrics that make one number of several answers.

    Attributes:
        over: what several answers of a pair count as: `"mean"`, each by itself, or `"logsumexp"`, all as one event.
    """

    _: KW_ONLY
    over: Over = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        read_one_of(self.over, what=f"{self.name}: over", options=("mean", "logsumexp"))

    def mean(self, values: ByAnswer, field: str) -> Float[Tensor, "cells pairs read"]:
        """The mean over the answers."""
        real = self._ids(field).real.to(values.device)[None, :, None]
        return values.masked_fill(~real, 0.0).sum(-1) / real.sum(-1)

    def logsumexp(self, values: ByAnswer, field: str) -> Float[Tensor, "cells pairs read"]:
        """The logit, or log-probability, of the event that any of the answers comes."""
        real = self._ids(field).real.to(values.device)[None, :, None]
        return values.masked_fill(~real, -torch.inf).logsumexp(-1)

    def join(self, values: ByAnswer, field: str) -> Float[Tensor, "cells pairs read"]:
        """One logit, or log-probability, for all answers, as `over` says."""
        if values.shape[-1] == 1:
            return values[..., 0]
        joined: Callable[..., Tensor] = self.mean if self.over == "mean" else self.logsumexp
        return joined(values, field)


@dataclass(frozen=True, eq=False)
class LogitDiff(OfGroups):
    """The answer's logit minus the wrong answer's.

    Attributes:
        wrong: the other token or tokens, like `answer`.

    Example:
        `LogitDiff(" Mary", " John")` at the last position.
    """

    given: ClassVar[tuple[str, ...]] = ("answer", "wrong")

    wrong: Tokens | Answers | None = None

    def tokens_read(self, runs: Runs) -> set[int] | None:
        """Those of the answers: no other logit counts."""
        return {one for field in self.given for one in self._answers_of(field, runs).ids.flatten().tolist()}

    def among(self, places: Int[Tensor, " d_vocab"]) -> Metric:
        """The metric with the answers' places in place of their ids."""
        tokens = {field: getattr(self, field) for field in self.given}
        moved: dict[str, Any] = {
            field: one.among(places) if isinstance(one, Answers) else one for field, one in tokens.items()
        }
        return replace(self, **moved)

    def measure(self, logits: Cells) -> Values:
        """`l[answer] - l[wrong]`, each joined over its answers."""
        answer, wrong = (self.join(self.read(logits, field), field) for field in self.given)
        return self.average(answer - wrong)


@dataclass(frozen=True, eq=False)
class LogProb(OfGroups):
    """The log-probability of the answer, in nats."""

    def measure(self, logits: Cells) -> Values:
        """`log p[answer]`, joined over the answers."""
        return self.average(self.join(self.read(logits, "answer"), "answer") - widen(logits).logsumexp(-1))


@dataclass(frozen=True, eq=False)
class Probability(OfGroups):
    """The probability of the answer."""

    def measure(self, logits: Cells) -> Values:
        """The mean or the sum of `p[answer]`."""
        of_each = self.read(logits, "answer") - widen(logits).logsumexp(-1, keepdim=True)
        if self.over == "mean":
            return self.average(self.mean(of_each.exp(), "answer"))
        return self.average(self.logsumexp(of_each, "answer").exp())


@dataclass(frozen=True, eq=False)
class Accuracy(OfAnswers):
    """1 where the answer, or one of several, has the largest logit, else 0."""

    def measure(self, logits: Cells) -> Values:
        """Whether an answer comes first."""
        ids = self._ids("answer")
        ids.read(logits, what=f"{self.name}: answer")
        return self.average(ids.hold(logits.argmax(-1)).to(widen(logits[:0]).dtype))
