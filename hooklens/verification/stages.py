"""The stages of a verification: checks that are made together, by group."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch

from hooklens.verification.comparing.edit_values import check_edit_values
from hooklens.verification.comparing.options import check_caches, check_chosen, check_loss
from hooklens.verification.comparing.recomputing import check_explicit_logits, check_ways
from hooklens.verification.comparing.single_edits import SingleEdits
from hooklens.verification.comparing.ways import can_be_cut, runs_in_pieces
from hooklens.verification.editing import check_editing
from hooklens.verification.explicit import Batch, ExplicitNetwork
from hooklens.verification.gradients import check_gradients
from hooklens.verification.probe import Probe
from hooklens.verification.reference import cast_model
from hooklens.verification.report import CheckResult
from hooklens.verification.watching import check_captures, check_watching, check_writing_back

RUNS = "checks run to their end"

# Below this many parameters a copy in float64 costs little: gradients can be held against differences, and the logits
# of each way of running against an explicit computation.
SMALL_MODEL = 50_000_000
# Below this many the logits of each of some hundred edits can.
_TINY_MODEL = 5_000_000

Stage = tuple[str, Callable[[], Iterable[CheckResult]]]


def hook_point_stages(probe: Probe, *, gradients: bool = True) -> list[Stage]:
    """The checks that need nothing but the network, each made when it is asked for.

    An error of the network is a failure like any other, so that nothing is lost that was found before.

    Args:
        probe: the model and its input.
        gradients: those of gradients, too.
    """
    return [stage for stages in stage_groups(probe, gradients=gradients).values() for stage in stages]


def stage_groups(probe: Probe, *, gradients: bool = True) -> dict[str, list[Stage]]:
    """The same stages by what they check; a group that does not apply to the network has no stages."""
    size = probe.model.n_params_total

    @cache
    def wide() -> Probe:
        """The model in float64, if it is small; else as it is."""
        if probe.dtype == torch.float64 or size > SMALL_MODEL:
            return probe
        return replace(probe, model=cast_model(probe.model, torch.float64))

    @cache
    def single_edits() -> SingleEdits:
        explicit = size <= _TINY_MODEL and not find_unknown(probe)
        return SingleEdits(wide() if explicit else probe, explicit=explicit)

    def at(name: str) -> Iterator[CheckResult]:
        yield from check_writing_back(probe, name)
        yield from check_editing(probe, name)

    cut, explicit = can_be_cut(probe), size <= SMALL_MODEL and not find_unknown(probe)
    edits = [(f"single edits, {name}", partial(lambda name: single_edits().check(name), name)) for name in probe.names]
    groups: dict[str, list[Stage]] = {
        "shown tensors": [("shown tensors", lambda: check_ways(probe))],
        "explicit logits": [("explicit logits", lambda: check_explicit_logits(wide()))] if explicit else [],
        "single edits": [*edits, ("pairs of edits", lambda: single_edits().check_pairs())],
        "positions and layers": [("positions and layers", lambda: check_chosen(probe))] if cut else [],
        "loss": [("loss", lambda: check_loss(probe))] if cut else [],
        "caches": [("caches", lambda: check_caches(probe))] if runs_in_pieces(probe) else [],
        "edits as values": [("edits as values", lambda: check_edit_values(probe))] if cut and probe.layers else [],
        "watching": [("watching", lambda: [*check_watching(probe), *check_captures(probe)])],
        "hook points": [(name, partial(at, name)) for name in probe.names],
        "gradients": [("gradients", lambda: check_gradients(wide()))] if gradients else [],
    }
    return {group: [report_errors(stage) for stage in stages] for group, stages in groups.items()}


def report_errors(stage: Stage) -> Stage:
    """The stage, with an error that ends it as its last result."""
    name, run = stage

    def run_to_the_end() -> Iterator[CheckResult]:
        try:
            yield from run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            yield CheckResult(check=RUNS, subject=name, measured=1.0, bound=0.0, message=message)

    return name, run_to_the_end


def find_unknown(probe: Probe) -> dict[str, str]:
    """The parts that have no definition here, and why."""
    batch = Batch(tokens=probe.tokens, mask=torch.ones_like(probe.tokens, dtype=torch.bool))
    return ExplicitNetwork(probe.model, batch).why_unknown()
