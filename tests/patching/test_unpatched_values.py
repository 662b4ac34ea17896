"""Every experiment compares with the metric of the unpatched runs, so it refuses one that has no finite value there."""

from dataclasses import dataclass

import pytest
import torch

from hooklens import patching
from hooklens.patching import FractionRecovered, LogitDiff, Metric
from hooklens.patching.metrics.metric import Cells, Ends, Runs, Values
from tests.patching.test_pairs_everywhere import ANSWERS, EXPERIMENTS, MODEL, PAIRS, WRONGS


@dataclass(frozen=True, eq=False)
class Broken(Metric):
    """A difference of logits, but for the values that one pair has in one unpatched run, and another in the other."""

    clean: float = 0.0
    corrupted: float = 0.0

    def measure(self, logits: Cells) -> Values:
        return self.average(logits[..., 3] - logits[..., 4])

    def measure_ends(self, runs: Runs) -> Ends:
        clean, corrupted = super().measure_ends(runs)
        clean[1], corrupted[2] = self.clean, self.corrupted
        return clean, corrupted


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "NaN for the unpatched runs of pairs [1]": Broken(clean=NAN),
    "infinite for the unpatched runs of pairs [1]": Broken(clean=-INF),
    "infinite for the unpatched runs of pairs [2]": Broken(corrupted=INF),
    "NaN for the unpatched runs of pairs [1] and infinite for the unpatched runs of pairs [2]": Broken(
        clean=NAN, corrupted=INF
    ),
}


@pytest.mark.parametrize(("said", "metric"), BROKEN.items(), ids=range(len(BROKEN)))
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_no_finite_value_is_refused_before_anything_is_patched(experiment, said, metric):
    """Attribution gave NaN scores for a metric that is NaN, and infinite ones went through every experiment."""
    with pytest.raises(patching.MetricError) as refusal:
        experiment(PAIRS, metric=metric, progress=False)
    assert str(refusal.value) == f"metric Broken is {said}; nothing could be compared"


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_fractions_of_an_infinite_difference_are_refused(experiment):
    """They were said to be of two runs with the same value, or were 0 and NaN."""

    @dataclass(frozen=True, eq=False)
    class Infinite(Broken):
        def measure_ends(self, runs: Runs) -> Ends:
            return tuple(torch.full_like(end, INF) for end in super().measure_ends(runs))  # type: ignore[return-value]

    for inner in (Infinite(), Broken(clean=INF), Broken(corrupted=-INF)):
        with pytest.raises(
            patching.MetricError, match=r"^metric FractionRecovered\(\w+\) is NaN for the unpatched runs of pairs"
        ):
            experiment(PAIRS, metric=FractionRecovered(inner), progress=False)


@pytest.mark.parametrize("seed", range(6))
def test_a_held_out_pair_without_a_finite_value_is_refused_before_the_search(seed):
    """It would have been told after hours of search."""

    @dataclass(frozen=True, eq=False)
    class BrokenForOne(LogitDiff):
        def measure_ends(self, runs: Runs) -> Ends:
            ends = torch.stack(list(super().measure_ends(runs)))
            ends[:, [pair == 1 for pair in runs.pairs]] = NAN
            return ends[0], ends[1]

    with pytest.raises(patching.MetricError, match=r"NaN for the unpatched runs of pairs \[1\]"):
        patching.discover_circuit(
            MODEL, PAIRS, metric=BrokenForOne(ANSWERS, WRONGS), threshold=0.05, seed=seed, progress=False
        )


def test_no_finite_value_of_the_empty_circuit_is_refused():
    """Faithfulness was NaN."""
    circuits = [patching.Circuit([("embed", "logits")])]

    @dataclass(frozen=True, eq=False)
    class BrokenWhenAblated(LogitDiff):
        def measure_ends(self, runs: Runs) -> Ends:
            return tuple(torch.zeros_like(end) for end in super().measure_ends(runs))  # type: ignore[return-value]

        def measure(self, logits: Cells) -> Values:
            return super().measure(logits) * INF

    with pytest.raises(patching.MetricError, match="is NaN or infinite with every edge ablated"):
        patching.evaluate_circuits(
            MODEL, PAIRS, circuits=circuits, metric=BrokenWhenAblated(ANSWERS, WRONGS), progress=False
        )
