"""An interrupt at any line of an experiment gives what was measured, or, before that, nothing at all."""

import math
import sys
from pathlib import Path

import pytest
import torch

from hooklens import patching
from hooklens.patching import Circuit, LogitDiff
from hooklens.patching.estimates.edge_gradients import EdgeGradients
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff(3, 5)
_FOLDER = str(Path(patching.__file__).parent)
_OPTIONS = {"batch_size": 2, "progress": False}

RUNS = {
    "sweep": lambda: patching.sweep(
        MODEL, CLEAN, CORRUPTED, patching.grid("z", layers=1, positions=-1), METRIC, **_OPTIONS
    ),
    "paths": lambda: patching.path_patch(
        MODEL, CLEAN, CORRUPTED, ["embed", "a0.h1", "m0", "a1.h0"], ["a1.h1.q", "logits"], METRIC, **_OPTIONS
    ),
    "attribution": lambda: patching.attribution(MODEL, CLEAN, CORRUPTED, ["z", "mlp_out"], METRIC, **_OPTIONS),
    "edges": lambda: patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, **_OPTIONS),
    "sums of edges": lambda: patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, keep_pairs=False, **_OPTIONS),
    "exact edges": lambda: patching.edge_attribution(
        MODEL, CLEAN, CORRUPTED, METRIC, method="exact", batch_size=60, progress=False
    ),
    "circuits": lambda: patching.evaluate_circuits(
        MODEL, CLEAN, CORRUPTED, [Circuit.full(MODEL.cfg), Circuit([("embed", "logits")])], METRIC, **_OPTIONS
    ),
    "discovery": lambda: patching.discover_circuit(
        MODEL, CLEAN, CORRUPTED, threshold=0.05, batch_size=30, progress=False
    ),
}


class _Interrupt:
    """Ctrl-C at the n-th line of the package, or of one function, that runs; later lines run as ever."""

    def __init__(self, at, function=None):
        self.at, self.lines, self.function = at, 0, function

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(_FOLDER):
            return None
        if self.function is not None and frame.f_code.co_name != self.function:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def interrupt(run, at, function=None):
    """How many lines a call ran, and what it gave or raised."""
    trace, found, before = _Interrupt(at, function), None, sys.gettrace()
    sys.settrace(trace)
    try:
        found = run()
    except BaseException as error:
        found = error
    finally:
        sys.settrace(before)
    return trace.lines, found


def measured(result):
    """All numbers of a result, in which NaN stands for what was not measured."""
    if isinstance(result, patching.EdgeScores):
        values = result.scores[..., None] if result.per_pair is None else result.per_pair
        return [values, result.clean_per_pair, result.corrupted_per_pair]
    if isinstance(result, patching.CircuitResult):
        return [result.per_pair, result.full_per_pair, result.empty_per_pair]
    return [result.per_pair, result.clean_per_pair, result.corrupted_per_pair]


def check_partial(part, whole, *, is_sum):
    """Nothing in a partial result differs from the whole one."""
    if isinstance(whole, patching.Discovery):
        assert part.decisions == whole.decisions[: len(part.decisions)]
        gone = [(each.writer, each.reader) for each in part.decisions if each.verdict != "kept"]
        assert part.circuit == Circuit.full(MODEL.cfg).without_edges(gone)
        damages = [each.damage for each in part.decisions if each.verdict == "removed"]
        assert part.damage == (damages[-1] if damages else 0.0)
        return
    for found, expected in zip(measured(part), measured(whole), strict=True):
        known = ~found.isnan()
        assert found.shape == expected.shape
        if not is_sum or found.ndim == 1:
            assert torch.equal(found[known], expected[known])


@pytest.mark.parametrize("n_samples", [6, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_at_any_line_gives_what_was_measured_or_nothing(name, n_samples):
    """Outside sweeps, Ctrl-C beside the progress bar or on the way out of it, lost all that was measured."""
    run = RUNS[name]
    logits = MODEL(CLEAN)
    whole = run()
    n_lines, _ = interrupt(run, 0)
    assert n_lines > 200
    kept = set()
    # Each sample in another part of the call, at places that no loop repeats.
    for number in range(n_samples):
        at = 1 + math.floor((number + (number * 0.618) % 1) * n_lines / n_samples) % n_lines
        _, found = interrupt(run, at)
        where = f"{name}: line {at} of {n_lines}: {found!r}"
        if type(found) is KeyboardInterrupt:
            kept.add(False)
        else:
            assert isinstance(found, patching.SweepInterruptedError | patching.DiscoveryInterruptedError), where
            assert isinstance(found.__cause__, KeyboardInterrupt)
            check_partial(found.result, whole, is_sum=name == "sums of edges")
            kept.add(True)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (True, False), where
        assert not any(point.listening for point in MODEL.hook_points().values()), where
        assert all(weight.grad is None for weight in MODEL.parameters()), where
        del found
    assert kept == {False, True}
    assert torch.equal(MODEL(CLEAN), logits)
    again = run()
    if isinstance(whole, patching.Discovery):
        assert again.decisions == whole.decisions
    else:
        assert all(map(torch.equal, map(torch.nan_to_num, measured(again)), map(torch.nan_to_num, measured(whole))))


def test_a_decision_is_made_in_one_step():
    """A search that was stopped behind its note of a decision had the edge still in its circuit."""
    run = RUNS["discovery"]
    whole = run()
    for at in range(1, 13):
        _, found = interrupt(run, at, function="_note")
        assert isinstance(found, patching.DiscoveryInterruptedError)
        check_partial(found.result, whole, is_sum=False)


def test_sums_of_an_interrupted_attribution_are_of_the_pairs_that_were_scored(monkeypatch):
    """Means over fewer pairs are right numbers, of fewer pairs."""
    score, groups = EdgeGradients.run, []

    def stop(self, group):
        groups.append(group)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return score(self, group)

    monkeypatch.setattr(EdgeGradients, "run", stop)
    with pytest.raises(patching.SweepInterruptedError, match=r"stopped after (\d+) of \d+ values") as caught:
        RUNS["sums of edges"]()
    monkeypatch.undo()
    two = patching.edge_attribution(MODEL, CLEAN[:2], CORRUPTED[:2], METRIC, progress=False)
    torch.testing.assert_close(caught.value.result.scores, two.scores, rtol=0, atol=1e-12)
    assert f"stopped after {2 * int(two.exists.sum())} of {3 * int(two.exists.sum())} values" in str(caught.value)
