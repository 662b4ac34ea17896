"""Every hook point is alive: an edit changes everything downstream of its tensor, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import find_site
from hooklens.errors import join_names
from hooklens.hooks import HookPoint
from hooklens.model.parts.part import Part
from hooklens.verification.dataflow import downstream_of
from hooklens.verification.probe import Probe, largest_difference, same_bits
from hooklens.verification.report import CheckResult

EQUAL_COPY = "writing back an equal copy"
CHANGES_LOGITS = "an edit changes the logits"
REACHES = "an edit reaches all that is downstream"
SPARES = "an edit reaches nothing else"
STAYS = "an edit stays in its row and after its position"
IN_PLACE = "in-place and returned edits agree"

_LOGITS = "unembed.hook_out"


@dataclass(frozen=True)
class _EditedRun:
    logits: Tensor
    captures: dict[str, Tensor]


def check_editing(probe: Probe, name: str) -> list[CheckResult]:
    """Change the whole tensor at a point, by returning another one and in place, and look at everything else."""
    n_ids = count_ids(probe, name)
    if n_ids is not None and probe.clean_captures[name].shape[-1] == n_ids:
        # Where everything is chosen, nothing else can be.
        return []
    returned = _run_edited(probe, name, lambda tensor, hook: strong_edit(name, tensor, n_ids))
    in_place = _run_edited(probe, name, lambda tensor, hook: _edit_in_place(name, tensor, n_ids))
    return [
        *_compare_with_copy(probe, name, returned.logits),
        *_compare_with_wiring(probe, name, returned),
        _compare_ways(name, returned, in_place),
        _check_locality(probe, name),
    ]


def _compare_with_copy(probe: Probe, name: str, edited: Tensor) -> list[CheckResult]:
    """An equal copy changes the logits by rounding at most, the edit by more than that copy did, if they read it.

    The copy takes the way of an edit, so an edit that is lost would leave exactly the logits of the copy.
    """
    with probe.model.hooks([(name, lambda tensor, hook: tensor.clone())]):
        copied = probe.run()
    rounding, moved = largest_difference(copied, probe.clean_logits), largest_difference(edited, copied)
    copy_problem = "" if rounding <= probe.rounding else "an equal value must give equal logits, up to rounding"
    copy = CheckResult(check=EQUAL_COPY, subject=name, measured=rounding, bound=probe.rounding, message=copy_problem)
    if name != _LOGITS and _LOGITS not in downstream_of(name, [*probe.names, _LOGITS], probe.model.cfg, possibly=True):
        # Nothing reads what the edit changes: the scores of queries that see one key each, say.
        return [copy]
    lost = "" if moved > rounding else f"{_describe_edit(name)} moves no logit by more than rounding: the edit is lost"
    return [
        copy,
        CheckResult(check=CHANGES_LOGITS, subject=name, measured=moved, bound=rounding, relation=">", message=lost),
    ]


def count_ids(probe: Probe, name: str) -> int | None:
    """How many things the numbers at a point are chosen from; None where they are no names."""
    site = find_site(name)
    if site is None or not site.discrete:
        return None
    part = probe.model.get_submodule(name.rpartition(".")[0])
    assert isinstance(part, Part)
    return part.size_of("expert")


def strong_edit(name: str, tensor: Tensor, n_ids: int | None = None) -> Tensor:
    """A new value that differs everywhere: zero, except where that would not be a number or not an edit.

    A norm's denominator is doubled, since nothing can be divided by 0, and its sign turned: of a size alone, a norm
    behind maps that are homogeneous leaves nothing. Of the scores the finite ones become 0,
    which makes the pattern uniform; what the mask hides stays hidden. Numbers that name one of `n_ids` things name the
    next one.
    """
    if n_ids is not None:
        return (tensor + 1) % n_ids
    if name.endswith("hook_scale"):
        return tensor * -2
    if name.endswith("hook_attn_scores"):
        return tensor.masked_fill(tensor.isfinite(), 0)
    return torch.zeros_like(tensor)


def _edit_in_place(name: str, tensor: Tensor, n_ids: int | None) -> None:
    tensor.copy_(strong_edit(name, tensor, n_ids))


def _describe_edit(name: str) -> str:
    if name.endswith("hook_scale"):
        return "doubling it with the other sign"
    if (site := find_site(name)) is not None and site.discrete:
        return "naming the next ones"
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
        region.copy_(strong_edit(name, region, count_ids(probe, name)))
        return edited

    with probe.model.hooks([(name, edit_region)]):
        logits = probe.run()
    clean = probe.clean_logits
    elsewhere = largest_difference(logits[1:], clean[1:])
    if probe.model.cfg.causal:
        elsewhere = max(elsewhere, largest_difference(logits[0, :middle], clean[0, :middle]))
    message = "" if elsewhere <= probe.rounding else f"edited row 0 from position {middle} on; logits elsewhere moved"
    return CheckResult(check=STAYS, subject=name, measured=elsewhere, bound=probe.rounding, message=message)
