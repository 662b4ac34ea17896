"""Watching changes nothing: every point fires once with its declared axes, and leaves the logits as they were."""

import torch
from torch import Tensor

from hooklens.axes import find_site
from hooklens.hooks import HookPoint
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.part import Part
from hooklens.verification.probe import PaddingSide, Probe, as_logits, largest_difference, same_bits
from hooklens.verification.report import CheckResult

FIRES = "fires once"
AXES = "declared axes"
WATCHING = "watching leaves logits bit-identical"
KEPT = "captures hold what passed"
SAME_TENSOR = "writing back the same tensor"
EQUAL_IN_PLACE = "writing back in place"

_NOT_BITWISE = "the logits must be bit-identical: the computation must not go through what is only watched"


def check_firing(probe: Probe) -> list[CheckResult]:
    """Each point, on-request ones included, fires exactly once in a forward, with the axes of `hooklens.axes`."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in probe.names}

    def note_shape(tensor: Tensor, hook: HookPoint) -> None:
        shapes[str(hook.name)].append(tuple(tensor.shape))

    with probe.model.hooks([(probe.names, note_shape)]):
        probe.run()
    results = []
    for name, seen in shapes.items():
        message = "" if len(seen) == 1 else "a point exists if and only if it fires, exactly once per forward"
        results.append(
            CheckResult(check=FIRES, subject=name, measured=float(len(seen)), bound=1.0, relation="==", message=message)
        )
        results += [_check_axes(probe, name, shape) for shape in seen[:1]]
    return results


def _check_axes(probe: Probe, name: str, found: tuple[int, ...]) -> CheckResult:
    declared = probe.model.cfg.description.points
    site = declared.get(name) or probe.model.hook_points()[name].site or find_site(name)
    if site is None:
        return CheckResult(
            check=AXES, subject=name, measured=1.0, bound=0.0, message="the name is not in hooklens.axes.HOOK_SITES"
        )
    by_input = {"batch": probe.tokens.shape[0], **dict.fromkeys(("pos", "query", "key"), probe.n_tokens)}
    part = probe.model.get_submodule(name.rpartition(".")[0])
    size_of = part.size_of if isinstance(part, Part | Adapted) else probe.model.cfg.size
    expected = tuple(by_input[axis] if axis in by_input else size_of(axis) for axis in site.axes)
    wrong = sum(one != other for one, other in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
    sizes = ", ".join(f"{axis}={size}" for axis, size in zip(site.axes, expected, strict=True))
    message = f"axes of another size: found {list(found)}, declared [{sizes}]" if wrong else ""
    return CheckResult(check=AXES, subject=name, measured=float(wrong), bound=0.0, message=message)


def check_watching(probe: Probe) -> list[CheckResult]:
    """Captures and hooks that return None, at all points at once and at each alone, leave every bit of the logits."""
    return [
        *(_check_watched_run(probe, side) for side in (None, "left", "right")),
        _check_watched_run(probe, None, inference_mode=True),
        *(_check_watched_alone(probe, name) for name in probe.names),
    ]


def check_captures(probe: Probe) -> list[CheckResult]:
    """A captured tensor, which is not a copy, holds at the end of the forward what it held when it passed."""
    passed: dict[str, Tensor] = {}

    def copy(tensor: Tensor, hook: HookPoint) -> None:
        passed[str(hook.name)] = tensor.clone()

    with probe.model.hooks([(probe.names, copy)]), probe.model.capture(probe.names) as captured:
        probe.run()
    return [
        _compare_bits(KEPT, name, captured[name], tensor, problem="an in-place operation in the model changed it later")
        for name, tensor in passed.items()
    ]


def _check_watched_run(probe: Probe, side: PaddingSide | None, *, inference_mode: bool = False) -> CheckResult:
    tokens, mask = (probe.tokens, None) if side is None else probe.pad(side)
    with torch.inference_mode(inference_mode):
        plain = as_logits(probe.model(tokens, attention_mask=mask))
        with probe.model.hooks([(probe.names, _keep)]), probe.model.capture(probe.names):
            watched = as_logits(probe.model(tokens, attention_mask=mask))
    subject = "every point at once" + (f", {side}-padded" if side else "") + (", inference mode" * inference_mode)
    return _compare_bits(WATCHING, subject, watched, plain)


def _check_watched_alone(probe: Probe, name: str) -> CheckResult:
    with probe.model.hooks([(name, _keep)]), probe.model.capture(name):
        return _compare_bits(WATCHING, name, probe.run(), probe.clean_logits)


def check_writing_back(probe: Probe, name: str) -> list[CheckResult]:
    """Writing back a point's own value changes nothing.

    Bit for bit when the tensor itself comes back. An edit in place, also one that multiplies by 1, counts as an
    edit: from a side tensor (the pattern, a norm's scale, per-head copies) the computation then goes on
    explicitly instead of through the fused kernel, which rounds differently.
    """
    with probe.model.hooks([(name, _return_same)]):
        same = _compare_bits(SAME_TENSOR, name, probe.run(), probe.clean_logits)
    with probe.model.hooks([(name, _multiply_by_one)]):
        measured = largest_difference(probe.run(), probe.clean_logits)
    message = "" if measured <= probe.rounding else "an equal value must give equal logits, up to rounding"
    return [
        same,
        CheckResult(check=EQUAL_IN_PLACE, subject=name, measured=measured, bound=probe.rounding, message=message),
    ]


def _compare_bits(
    check: str, subject: str, found: Tensor, expected: Tensor, *, problem: str = _NOT_BITWISE
) -> CheckResult:
    equal = same_bits(found, expected)
    measured = largest_difference(found, expected) if found.shape == expected.shape else float("inf")
    if not equal and measured == 0:
        # -0.0 for 0.0, or another dtype: no distance, but other bits.
        measured = float("nan")
    return CheckResult(check=check, subject=subject, measured=measured, bound=0.0, message="" if equal else problem)


def _keep(tensor: Tensor, hook: HookPoint) -> None:
    """Look, and change nothing."""


def _return_same(tensor: Tensor, hook: HookPoint) -> Tensor:
    return tensor


def _multiply_by_one(tensor: Tensor, hook: HookPoint) -> None:
    tensor.mul_(1)
