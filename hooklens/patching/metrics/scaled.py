"""A metric on a scale from the corrupted run to the clean one, for each pair by itself."""

from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_tensor, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, warn_caller
from hooklens.patching.errors import MetricError, SmallDifferenceWarning
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import (
    Cells,
    Ends,
    Metric,
    Positions,
    Runs,
    Values,
    check_rows,
    check_shape,
    prepare_metric,
)
from hooklens.patching.results.scale import find_small_differences


@dataclass(frozen=True, eq=False)
class FractionRecovered(Metric):
    """Another metric on a scale where the corrupted run of each pair is 0 and its clean run 1.

        fraction of a pair = (m - m_corrupted) / (m_clean - m_corrupted)

    (Zhang and Nanda 2023, "Towards Best Practices of Activation Patching", the normalised logit difference). An
    average over pairs is a *mean of ratios*: every pair counts alike, and pairs whose two runs nearly agree have
    large fractions of either sign. `SweepResult.normalized` of the inner metric is a *ratio of means*, in which such
    pairs count little. The scale does not turn with the direction: 1 is the clean run under `"noise"`, too, where
    `normalized` is 1 at the corrupted run. So with the same runs

        FractionRecovered = normalized_per_pair          under direction="denoise"
        FractionRecovered = 1 - normalized_per_pair      under direction="noise"

    An experiment gives a `SmallDifferenceWarning` that names the pairs whose two runs differ by less than a
    twentieth of the root mean square over the pairs at hand.

    Attributes:
        metric: what is scaled, a metric or a function; its positions are read.
        ends: its values in the corrupted and the clean run: one for all pairs, or one for each; None: taken from the
            runs.

    Raises:
        InputError: `pos`, which the inner metric has, or ends that are no numbers.
    """

    metric: Metric | MetricFunction
    ends: tuple[Float[Tensor, "..."], Float[Tensor, "..."]] | None = None
    _: KW_ONLY
    pos: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pos is not None:
            raise InputError(f"FractionRecovered reads where its metric does; give pos={self.pos!r} to that one")
        object.__setattr__(self, "metric", as_metric(self.metric))
        if self.ends is not None:
            object.__setattr__(self, "ends", _read_ends(self.ends))

    @property
    def inner(self) -> Metric:
        """What is scaled."""
        assert isinstance(self.metric, Metric)
        return self.metric

    @property
    def positions(self) -> list[int] | None:
        """The inner metric's."""
        return self.inner.positions

    @property
    def name(self) -> str:
        """The inner metric's name, said to be scaled."""
        return f"FractionRecovered({self.inner.name})"

    @property
    def needs_all_pairs(self) -> bool:
        """As the inner metric."""
        return self.inner.needs_all_pairs

    def prepare(self, runs: Runs) -> Metric:
        """The metric with its values in both runs.

        Raises:
            InputError: a pair's two runs have the same value, so there is nothing to recover.
        """
        ends = self._find_ends(runs)
        self._report_small(ends, runs.pairs)
        return replace(self, metric=prepare_metric(self.inner, runs), ends=ends)

    def measure_ends(self, runs: Runs) -> Ends:
        """The fractions of both unpatched runs: 1 and 0, unless other ends are given."""
        corrupted, clean = self._find_ends(runs)
        found = self.inner.measure_ends(runs)
        return tuple((value - corrupted) / (clean - corrupted) for value in found)  # type: ignore[return-value]

    def tokens_read(self, runs: Runs) -> set[int] | None:
        """Those of the inner metric."""
        return self.inner.tokens_read(runs)

    def among(self, places: Int[Tensor, " d_vocab"]) -> Metric:
        """The metric with the inner one's answers moved."""
        return replace(self, metric=self.inner.among(places))

    def encode(self, model: HookedCausalLM) -> Metric:
        """The metric with the inner one encoded."""
        return replace(self, metric=self.inner.encode(model))

    def measure(self, logits: Cells) -> Values:
        """`(m - m_corrupted) / (m_clean - m_corrupted)`."""
        if self.ends is None:
            raise MetricError("FractionRecovered was not prepared: give ends to use it outside a sweep")
        values = self.inner.measure(logits)
        corrupted, clean = (end.to(values) for end in self.ends)
        for end in (corrupted, clean):
            check_rows(len(end), logits.shape[1], what="FractionRecovered: ends")
        return (values - corrupted) / (clean - corrupted)

    def _find_ends(self, runs: Runs) -> Ends:
        """The values in the corrupted and the clean run of some pairs."""
        if self.ends is None:
            clean, corrupted = self.inner.measure_ends(runs)
        else:
            given = [runs.rows_of(end, what="FractionRecovered: ends") for end in self.ends]
            corrupted, clean = (end.to(runs.clean_logits.device).expand(len(runs.pairs)) for end in given)
        # What is infinite is refused as any metric's.
        is_same = (clean == corrupted) & clean.isfinite()
        same = [pair for pair, is_equal in zip(runs.pairs, is_same.tolist(), strict=True) if is_equal]
        if same:
            raise InputError(
                f"{self.name}: the clean and the corrupted run of pairs {same} have the same value, so no fraction of "
                "their difference exists; choose prompts that differ in the metric"
            )
        return corrupted, clean

    def _report_small(self, ends: Ends, pairs: tuple[int, ...]) -> None:
        small = find_small_differences(ends[1] - ends[0])
        if small:
            named = ", ".join(f"{pairs[place]} ({share:.2%})" for place, share in list(small.items())[:10])
            warn_caller(
                f"{self.name}: the clean and the corrupted run nearly agree in {len(small)} of {len(pairs)} pairs: "
                f"{named} of the root mean square difference; their fractions can outweigh all others in a mean. "
                "result.normalized of the inner metric divides means instead",
                SmallDifferenceWarning,
            )


def _read_ends(ends: object) -> tuple[Tensor, Tensor]:
    """Both ends as vectors.

    Raises:
        InputError: no two tensors, or of more than one axis.
    """
    if not isinstance(ends, tuple | list) or len(ends) != 2:
        raise InputError(f"FractionRecovered: ends is {show(ends)}; expected the pair (corrupted, clean) of tensors")
    read = []
    for given, name in zip(ends, ("corrupted", "clean"), strict=True):
        what = f"FractionRecovered: the {name} end"
        end = read_tensor(given, what=what)
        end = end[None] if end.ndim == 0 else end
        check_shape(end, (None,), "pairs", what=what)
        read.append(end if end.is_floating_point() else end.to(torch.get_default_dtype()))
    return read[0], read[1]
