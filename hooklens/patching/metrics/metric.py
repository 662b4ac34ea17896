"""What a metric is: which logits it reads, and how it makes one number per pair of them.

An experiment prepares a metric for the pairs at hand (`prepare_metric`), which gives token ids and references their
values; `measure` then takes logits `[cells pairs read d_vocab]`. Numbers are at least float32, whatever the logits.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.patching.errors import MetricError, SiteError
from hooklens.patching.pairs.answers import Answers
from hooklens.precision import widen

Positions = Choice
"""Positions as a caller names them; not a slice, which is no number of positions."""

Cells = Float[Tensor, "cells pairs read d_vocab"]
Values = Float[Tensor, "cells pairs"]
Ends = tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The two unpatched runs of some pairs, from which a metric takes what it compares with.

    Attributes:
        model: the model.
        pairs: which pairs of the experiment these are.
        n_pairs: how many pairs the experiment has; None: they come one after another, and it is not known.
        width: tokens of the experiment's longest prompt; where that is not known, of these pairs'.
        tokens: ids of the run that is measured, `[pairs pos]`, padded on the right.
        clean_tokens, corrupted_tokens: the same of both unpatched runs.
        lengths: tokens of each pair.
        clean_logits: at the positions the metric reads.
        corrupted_logits: the same of the corrupted run.
        answers, wrongs: what the pairs bring along themselves, where they do.
    """

    model: HookedCausalLM
    pairs: tuple[int, ...]
    n_pairs: int | None
    width: int
    tokens: Int[Tensor, "pairs pos"]
    clean_tokens: Int[Tensor, "pairs pos"]
    corrupted_tokens: Int[Tensor, "pairs pos"]
    lengths: tuple[int, ...]
    clean_logits: Float[Tensor, "pairs read d_vocab"]
    corrupted_logits: Float[Tensor, "pairs read d_vocab"]
    answers: Answers | None = None
    wrongs: Answers | None = None

    def rows_of(self, given: Tensor, *, what: str) -> Tensor:
        """The rows that these pairs have of a tensor with one row for all pairs, or one for each of the experiment.

        Raises:
            InputError: another number of rows.
        """
        if len(given) == 1:
            return given
        if self.n_pairs is None:
            raise InputError(
                f"{what} has {len(given)} rows, but the pairs come from a loader, so their number is not known; give "
                "one row for all, or the pairs as a list"
            )
        if len(given) != self.n_pairs:
            raise InputError(f"{what} has {len(given)} rows; expected 1 or one per pair ({self.n_pairs})")
        return given[list(self.pairs)]


@dataclass(frozen=True, eq=False)
class Metric(ABC):
    """Base of all metrics; a new kind defines `measure`, and `prepare` if it compares with something.

    Attributes:
        pos: the positions read, among a prompt's real tokens: an int, or a list, range, array or tensor of ints;
            negative ones count from its end; None: all. With several positions the metric is their mean.
        real: of prompts of different length, which columns are tokens and not padding; None: all.

    Raises:
        InputError: `pos` is something else.
    """

    _: KW_ONLY
    pos: Positions = -1
    real: Bool[Tensor, "pairs read"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        chosen = read_choice(self.pos, what=f"{type(self).__name__}: pos")
        if isinstance(chosen, slice):
            raise InputError(
                f"{type(self).__name__}: pos={show(self.pos)} is a slice, of which prompts of different length have "
                "different parts; give the positions, or None for all"
            )
        object.__setattr__(self, "pos", chosen)

    @property
    def positions(self) -> list[int] | None:
        """The positions read, as a list; None: all."""
        if self.pos is None:
            return None
        assert isinstance(self.pos, int | tuple)
        return [self.pos] if isinstance(self.pos, int) else list(self.pos)

    @property
    def name(self) -> str:
        """What a table or plot calls the metric."""
        return type(self).__name__

    @property
    def needs_all_pairs(self) -> bool:
        """Whether the metric cannot be measured for some of the pairs alone."""
        return False

    def find_reads(self, lengths: tuple[int, ...], width: int) -> list[list[int]]:
        """The columns read in each of some prompts that are padded on the right; all of `width` where `pos` is None.

        Raises:
            SiteError: a position that a prompt does not have, or that two numbers name.
        """
        positions = self.positions
        if positions is None:
            return [list(range(width))] * len(lengths)
        outside = [pos for pos in positions if not -min(lengths) <= pos < min(lengths)]
        if outside:
            raise SiteError(
                f"metric {self.name} reads positions {outside}, which do not lie in every prompt; the shortest has "
                f"{min(lengths)} tokens"
            )
        read = tuple(positions)
        columns = {
            length: resolve_choice(
                read, length, what=f"metric {self.name}: pos", noun=f"tokens in a prompt of {length}", error=SiteError
            )
            for length in set(lengths)
        }
        return [columns[length] for length in lengths]

    def prepare(self, runs: Runs) -> "Metric":
        """The metric for some pairs, with token ids and references filled in.

        Raises:
            InputError: an answer that is no single token, outside the vocabulary, or not one per pair.
        """
        return self

    def measure_ends(self, runs: Runs) -> Ends:
        """The values of the unpatched clean and corrupted run, each prepared with its own tokens."""
        return (
            prepare_metric(self, replace(runs, tokens=runs.clean_tokens)).measure(runs.clean_logits[None])[0],
            prepare_metric(self, replace(runs, tokens=runs.corrupted_tokens)).measure(runs.corrupted_logits[None])[0],
        )

    def tokens_read(self, runs: Runs) -> set[int] | None:
        """The tokens whose logits the metric reads for some pairs; None: all. The runs' logits are not read."""
        return None

    def among(self, places: Int[Tensor, " d_vocab"]) -> "Metric":
        """The metric for logits of some tokens only, which stand at these places; it must be encoded."""
        raise MetricError(f"{self.name} reads the logits of all tokens")

    def average(self, values: Float[Tensor, "cells pairs read"]) -> Values:
        """The mean over the positions read, padding left out."""
        wide = widen(values)
        if self.real is None:
            return wide.mean(-1)
        return wide.masked_fill(~self.real, 0.0).sum(-1) / self.real.sum(-1)

    def encode(self, model: HookedCausalLM) -> "Metric":
        """The metric with texts replaced by the model's token ids, for calls on logits outside a sweep.

        Raises:
            InputError: a text that is no single token, or an id outside the vocabulary.
        """
        return self

    @abstractmethod
    def measure(self, logits: Cells) -> Values:
        """The values of patched runs, from the logits at the positions read. The metric must be prepared."""

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The values of a batch of unpadded prompts, from their logits at all positions."""
        n_tokens = logits.shape[1]
        [columns] = self.find_reads((n_tokens,), n_tokens)
        chosen = logits if self.positions is None else logits[:, columns]
        return self.measure(chosen[None])[0]


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


def check_shape(found: Tensor, expected: tuple[int | None, ...], axes: str, *, what: str) -> None:
    """Refuse a tensor that would not stand entry by entry beside what it is compared with.

    Args:
        found: the tensor.
        expected: the size of each axis; None: one row, or one for each pair, which is checked elsewhere.
        axes: the axes' names.
        what: what an error calls the tensor.

    Raises:
        InputError: another number of axes, or another size.
    """
    fits = found.ndim == len(expected) and all(
        size is None or size == real for size, real in zip(expected, found.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("1 or pairs" if size is None else str(size) for size in expected)
        raise InputError(f"{what} has shape {list(found.shape)}; expected [{axes}], [{sizes}]")


def check_rows(n_rows: int, n_pairs: int, *, what: str) -> None:
    """Refuse another number of rows than one for all pairs of some logits or one for each.

    Raises:
        MetricError: it is another.
    """
    if n_rows not in (1, n_pairs):
        raise MetricError(f"{what} has {n_rows} rows for {n_pairs} rows of logits; expected 1 or one for each")
