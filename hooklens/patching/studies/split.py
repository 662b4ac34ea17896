"""Parting pairs of prompts, with what a metric holds for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hooklens.arguments import read_number, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Summary, format_numbers
from hooklens.errors import HookLensError, InputError
from hooklens.patching.metrics.function import FunctionMetric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.answers import Answers
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted, Mask, PromptPairs
from hooklens.patching.pairs.template import Pair


@dataclass(frozen=True, kw_only=True, repr=False)
class PairSplit(Displayed):
    """Pairs in two parts, those that a circuit is found on and those that it is tried on.

    Attributes:
        discovery, evaluation: the pairs, with the answers that they brought along.
        discovery_rows, evaluation_rows: which of the given pairs they are, in rising order.
    """

    discovery: tuple[Pair, ...]
    evaluation: tuple[Pair, ...]
    discovery_rows: tuple[int, ...]
    evaluation_rows: tuple[int, ...]

    def _summary(self) -> Summary:
        return Summary(
            title=f"PairSplit({len(self.discovery)} pairs for discovery, {len(self.evaluation)} for evaluation)",
            facts={
                "discovery": f"pairs {format_numbers(self.discovery_rows)}",
                "evaluation": f"pairs {format_numbers(self.evaluation_rows)}",
            },
        )


@reads()
def split_pairs(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    *,
    fraction: float = 0.5,
    seed: int = 0,
    attention_mask: Mask | None = None,
) -> PairSplit:
    """Part pairs at random into those for discovery and those for evaluation; no pair is in both.

    Args:
        model: whose tokenizer and vocabulary count.
        clean: clean prompts; with `corrupted=None` a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths.
        fraction: the share for discovery; both parts have at least one pair.
        seed: draws it. The global random state is neither read nor moved.
        attention_mask: real tokens (1) of padded ids, the same for both.

    Raises:
        InputError: a fraction that is none, or fewer than two pairs.
    """
    share = read_share(fraction, what="split_pairs: fraction")
    number = read_seed(seed, what="split_pairs: seed")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    rows = draw_rows(len(prompts), share, torch.Generator().manual_seed(number))
    others = [row for row in range(len(prompts)) if row not in set(rows)]
    return PairSplit(
        discovery=tuple(take_pairs(prompts, rows)),
        evaluation=tuple(take_pairs(prompts, others)),
        discovery_rows=tuple(rows),
        evaluation_rows=tuple(others),
    )


def read_share(given: object, *, what: str, error: type[HookLensError] = InputError) -> float:
    """A share of the pairs.

    Raises:
        HookLensError: no number between 0 and 1.
    """
    return read_number(
        given, what=what, expected="a number between 0 and 1", allows=lambda number: 0 < number < 1, error=error
    )


def draw_rows(n_pairs: int, fraction: float, generator: torch.Generator) -> list[int]:
    """Some of the pairs, at least one and not all, in rising order.

    Raises:
        InputError: fewer than two pairs.
    """
    if n_pairs < 2:
        raise InputError(
            f"there is {n_pairs} pair, which cannot be parted; give at least two, or leave the prompts together "
            "(split=None)"
        )
    n_drawn = min(max(1, round(fraction * n_pairs)), n_pairs - 1)
    return sorted(torch.randperm(n_pairs, generator=generator)[:n_drawn].tolist())


def take_pairs(prompts: PromptPairs, rows: Sequence[int]) -> list[Pair]:
    """Some of the pairs, each with its answers.

    Raises:
        InputError: noise stands in the place of their corrupted prompts.
    """
    if prompts.noise is not None:
        raise InputError(
            "noise stands in the place of the corrupted prompts, and no Pair can hold it; part the prompts, and give "
            "each part with the noise to what runs it (patching.held_out_curve does)"
        )
    return [
        Pair(
            prompts.clean[row, : prompts.lengths[row]],
            prompts.corrupted[row, : prompts.lengths[row]],
            answer=_answers_of(prompts.answers, row),
            wrong=_answers_of(prompts.wrongs, row),
        )
        for row in rows
    ]


def _answers_of(answers: Answers | None, row: int) -> list[int] | None:
    if answers is None:
        return None
    found: list[int] = answers.ids[row][answers.real[row]].tolist()
    return found


def take_metric(metric: Metric, rows: Sequence[int], n_pairs: int) -> Metric:
    """A metric for some of the pairs: of answers that it holds for each pair, these pairs'.

    Args:
        metric: the metric, its answers encoded.
        rows: the pairs.
        n_pairs: how many it was made for.

    Raises:
        InputError: a function, of which none can tell which pair a row is once pairs are parted.
    """
    if len(rows) == n_pairs:
        return metric
    if isinstance(metric, FunctionMetric):
        raise InputError(
            f"the metric {metric.name} is a function, which knows pairs by their row, and some of the pairs stand in "
            "other rows; use a metric of hooklens.patching, such as LogitDiff, or leave the pairs together"
        )
    inner = getattr(metric, "metric", None)
    taken: dict[str, Any] = {} if not isinstance(inner, Metric) else {"metric": take_metric(inner, rows, n_pairs)}
    for name in getattr(metric, "given", ()):
        held = getattr(metric, name)
        if isinstance(held, Answers) and len(held.ids) == n_pairs:
            taken[name] = held.take(list(rows))
    return replace(metric, **taken) if taken else metric
