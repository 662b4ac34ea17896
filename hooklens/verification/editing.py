"""Every hook point is alive: an edit changes everything downstream of its tensor, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import find_site
from hooklens.errors import join_names
from hooklens.hooks import HookPoint
from hooklens.verification.dataflow import downstream_of
from hooklens.verification.probe import Probe, largest_difference, same_bits
from hooklens.verification.report import CheckResult

EQUAL_COPY = "writing back an equal copy"
CHANGES_LOGITS = "an edit changes the logits"
REACHES = "an edit reaches all that is downstream"
SPARES = "an edit reaches nothing else"
STAYS = "an edit stays in its row and after its position"
IN_PLACE = "in-place and returned edits agree"


@dataclass(frozen=True)
class _EditedRun:
    logits: Tensor
    captures: dict[str, Tensor]


def check_editing(probe: Probe, name: str) -> list[CheckResult]:
    """Change the whole tensor at a point, by returning another one and in place, and look at everything else."""
    returned = _run_edited(probe, name, lambda tensor, hook: strong_edit(name, tensor))
    in_place = _run_edited(probe, name, lambda tensor, hook: _edit_in_place(name, tensor))
    return [
        *_compare_with_copy(probe, name, returned.logits),
        *_compare_with_wiring(probe, name, returned),
        _compare_ways(name, returned, in_place),
        _check_locality(probe, name),
    ]


def _compare_with_copy(probe: Probe, name: str, edited: Tensor) -> list[CheckResult]:
    """An equal copy changes the logits by rounding at most, the edit by more than that copy did.

    The copy takes the way of an edit, so an edit that is lost would leave exactly the logits of the copy.
    """
    with probe.model.hooks([(name, lambda tensor, hook: tensor.clone())]):
        copied = probe.run()
    rounding, moved = largest_difference(copied, probe.clean_logits), largest_difference(edited, copied)
    copy_problem = "" if rounding <= probe.rounding else "an equal value must give equal logits, up to rounding"
    lost = "" if moved > rounding else f"{_describe_edit(name)} moves no logit by more than rounding: the edit is lost"
    return [
        CheckResult(check=EQUAL_COPY, subject=name, measured=rounding, bound=probe.rounding, message=copy_problem),
        CheckResult(check=CHANGES_LOGITS, subject=name, measured=moved, bound=rounding, relation=">", message=lost),
    ]


def strong_edit(name: str, tensor: Tensor) -> Tensor:
    """A new value that differs everywhere: zero, except where that would not be a number or not an edit.

    A norm's denominator is doubled, since nothing can be divided by 0. Of the scores the finite ones become 0,
    which makes the pattern uniform; what the mask hides stays hidden.
    """
    if name.endswith("hook_scale"):
        return tensor * 2
    if name.endswith("hook_attn_scores"):
        return tensor.masked_fill(tensor.isfinite(), 0)
    return torch.zeros_like(tensor)


def _edit_in_place(name: str, tensor: Tensor) -> None:
    tensor.copy_(strong_edit(name, tensor))


def _describe_edit(name: str) -> str:
    if name.endswith("hook_scale"):
        return "doubling it"
    return "setting the finite scores to 0" if name.endswith("hook_attn_scores") else "setting it to 0"


def _run_edited(probe: Probe, name: str, edit: Callable[[Tensor, HookPoint], Tensor | None]) -> _EditedRun:
    with probe.model.hooks([(name, edit)]), probe.model.capture(probe.names) as captured:
        return _EditedRun(probe.run(), captured)


def _compare_with_wiring(probe: Probe, name: str, edited: _EditedRun) -> list[CheckResult]:
    """Hold what changed against the network's wiring."""
    expected = downstream_of(name, probe.names, probe.model.cfg)
    possible = downstream_of(name, probe.names, probe.model.cfg, possibly=True)
    clean = probe.clean_captures
    changed = {
        other
        for other, tensor in edited.captures.items()
        if other != name and other in clean and not same_bits(tensor, clean[other])
    }
    unreached = [other for other in probe.names if other in expected - changed]
    disturbed = [other for other in probe.names if other in changed - possible]
    return [
        _find_none(REACHES, name, unreached, "not reached"),
        _find_none(SPARES, name, disturbed, "changed, though not downstream"),
    ]


def _compare_ways(name: str, returned: _EditedRun, in_place: _EditedRun) -> CheckResult:
    """Both ways of editing hand the same tensor on, so that all that follows has the same bits."""
    tensors = {"the logits": (returned.logits, in_place.logits)}
    tensors |= {other: (tensor, in_place.captures[other]) for other, tensor in returned.captures.items()}
    differing = [other for other, (one, two) in tensors.items() if not same_bits(one, two)]
    return _find_none(IN_PLACE, name, differing, "these differ between the two")


def _find_none(check: str, subject: str, offenders: list[str], words: str) -> CheckResult:
    """The result of a check that holds where there are no offenders."""
    message = f"{words}: {join_names(offenders, limit=5)}" if offenders else ""
    return CheckResult(check=check, subject=subject, measured=float(len(offenders)), bound=0.0, message=message)


def _check_locality(probe: Probe, name: str) -> CheckResult:
    """An edit of the first row from the middle on leaves the other rows, and what no later token reaches, alone."""
    middle = probe.n_tokens // 2
    site = find_site(name)
    axis = 1 if site is None or "query" not in site.axes else site.axes.index("query")

    def edit_region(tensor: Tensor, hook: HookPoint) -> Tensor:
        edited = tensor.clone()
        region = edited[:1].narrow(axis, middle, tensor.shape[axis] - middle)
        region.copy_(strong_edit(name, region))
        return edited

    with probe.model.hooks([(name, edit_region)]):
        logits = probe.run()
    clean = probe.clean_logits
    elsewhere = largest_difference(logits[1:], clean[1:])
    if probe.model.cfg.causal:
        elsewhere = max(elsewhere, largest_difference(logits[0, :middle], clean[0, :middle]))
    message = "" if elsewhere <= probe.rounding else f"edited row 0 from position {middle} on; logits elsewhere moved"
    return CheckResult(check=STAYS, subject=name, measured=elsewhere, bound=probe.rounding, message=message)
