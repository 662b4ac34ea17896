"""What hook points show, and the logits, against their definitions; in every way of running."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hooklens.axes import EMBEDDINGS, find_site
from hooklens.config import HookedConfig, RotaryPositions, SinusoidalPositions
from hooklens.verification.comparing.ways import Way, ways_to_run
from hooklens.verification.explicit import ExplicitNetwork, ExplicitRun, Unknown
from hooklens.verification.explicit.network import LOGITS
from hooklens.verification.explicit.run import Edit
from hooklens.verification.probe import Probe, largest_difference, same_bits
from hooklens.verification.report import CheckResult

SHOWN = "shown tensors are what their sources make"
EXPLICIT = "logits are those of an explicit computation"
WATCHING = "watching leaves logits bit-identical"

# As in `Probe.rounding`: other orders of operations, in units of one rounding of every source.
_ROUNDING_FACTOR = 16.0
_FLOAT32 = torch.finfo(torch.float32).eps
# The points at which angles count; behind a rotation also what a norm there makes of it.
_BY_ANGLES = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pos_embed")


# How often rounding is drawn.
_N_DRAWS = 3
# What enters the stream.
_WRITTEN = (*EMBEDDINGS, "hook_attn_out", "hook_mlp_out")


Moves = dict[str, float]
"""By tensor, how far it moves at most."""


class _NotShown(Exception):  # noqa: N818
    """A source was left out of the run: it fires wrongly, which has been reported."""


@dataclass(frozen=True)
class Recomputed:
    """A tensor from its sources, and how far rounding may take what is shown from it.

    Attributes:
        value: float64.
        bound: of the largest difference.
    """

    value: Tensor
    bound: float


def recompute(network: ExplicitNetwork, name: str, shown: Mapping[str, Tensor], *, seed: int) -> Recomputed | None:
    """What a point's sources, as they are shown, make; None where one of them is not shown.

    The bound is measured: every source is changed by a random unit in the last place, and the change counted several
    times. Angles made in float32 are off by as much in relation to their own size.

    Raises:
        Unknown: the tensor has no definition.
    """
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(network.dtype).eps

    def read(source: str) -> Tensor:
        if source not in shown:
            raise _NotShown
        return shown[source].double()

    def read_roughly(source: str) -> Tensor:
        exact = read(source)
        sign = torch.randint(0, 2, exact.shape, generator=generator).to(exact) * 2 - 1
        return exact * (1 + eps * sign)

    try:
        value, moved = network.compute(name, read), network.compute(name, read_roughly)
    except _NotShown:
        return None
    size = largest(value)
    bound = _ROUNDING_FACTOR * (largest_difference(value, moved) + eps * size)
    if _makes_angles(network.cfg):
        # What turns at all is turned by float32 angles, here or inside what a changed copy makes.
        turns = name.endswith(_BY_ANGLES)
        bound += turns * 4 * _FLOAT32 * size * (1 + float(network.batch.positions().max()))
    return Recomputed(value, bound)


def _makes_angles(cfg: HookedConfig) -> bool:
    """Whether positions are angles, which are made in float32."""
    by_layer = (cfg.block(layer).positions for layer in range(cfg.n_layers))
    return any(isinstance(one, RotaryPositions | SinusoidalPositions) for one in (cfg.positions, *by_layer))


def largest(value: Tensor) -> float:
    """The largest finite absolute value."""
    return float(torch.where(value.isfinite(), value.abs(), 0.0).max()) if value.numel() else 0.0


def compare_shown(
    network: ExplicitNetwork, names: Sequence[str], shown: Mapping[str, Tensor], label: str, *, check: str, seed: int
) -> Iterator[CheckResult]:
    """Hold the tensors at some points against what their sources make; points without a definition are left out."""
    for name in names:
        if name not in shown:
            continue
        try:
            expected = recompute(network, name, shown, seed=seed)
        except Unknown:
            continue
        if expected is None:
            continue
        found = shown[name].double()
        if found.shape != expected.value.shape:
            measured, message = torch.inf, f"shape {list(found.shape)}, expected {list(expected.value.shape)}"
        else:
            measured = largest_difference(found, expected.value)
            message = "" if measured <= expected.bound else _describe_worst(name, found, expected.value)
        yield CheckResult(
            check=check, subject=f"{name}{label}", measured=measured, bound=expected.bound, message=message
        )


def _describe_worst(name: str, found: Tensor, expected: Tensor) -> str:
    """Where the two are furthest from each other."""
    off = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(nan=torch.inf)
    place = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
    site = find_site(name)
    axes = site.axes if site is not None and len(site.axes) == len(place) else [f"axis {i}" for i in range(len(place))]
    where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place, strict=True))
    one, other = float(found[tuple(place)]), float(expected[tuple(place)])
    return f"shows {one:.4g} where its sources make {other:.4g}, at {where}"


def check_ways(probe: Probe) -> Iterator[CheckResult]:
    """Every way of running shows what it should, and watching it changes nothing.

    Args:
        probe: the model in its own dtype.
    """
    for way in ways_to_run(probe):
        plain, watched = way.run(probe.model), way.run(probe.model, capture=probe.names)
        label = f", {way.label}"
        yield _compare_bits(f"every point at once{label}", watched.logits, plain.logits)
        network = ExplicitNetwork(probe.model, way.batch)
        shown = {**watched.captures, LOGITS: watched.logits}
        yield from compare_shown(network, [*probe.names, LOGITS], shown, label, check=SHOWN, seed=probe.seed)
        del shown, watched


def check_explicit_logits(probe: Probe) -> Iterator[CheckResult]:
    """In every way of running the logits are those that all definitions together make.

    Args:
        probe: the model in float64.
    """
    for way in ways_to_run(probe):
        explicit = ExplicitRun(probe.model, way.batch)
        found = way.run(probe.model).logits
        # Those of another row may be harder to compute than the probe's.
        rounding = max(probe.rounding, _ROUNDING_FACTOR * unit_rounding(probe, explicit)[LOGITS])
        bound = rounding + table_rounding(probe, way, explicit)[LOGITS]
        measured = largest_difference(found, explicit.logits)
        message = "" if measured <= bound else _describe_worst("unembed.hook_out", found, explicit.logits)
        yield CheckResult(check=EXPLICIT, subject=way.label, measured=measured, bound=bound, message=message)


def unit_rounding(probe: Probe, explicit: ExplicitRun, edits: Mapping[str, Edit] = MappingProxyType({})) -> Moves:
    """How far each tensor moves when what enters the stream is changed by a random unit in the last place.

    Args:
        probe: of which dtype the unit is, and the seed.
        explicit: the run.
        edits: measure in the run with these edits, what they make changed by a unit, too.
    """
    generator = torch.Generator().manual_seed(probe.seed)
    eps = torch.finfo(probe.dtype).eps

    def add_unit(tensor: Tensor) -> Tensor:
        sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + eps * sign)

    def then_add_unit(name: str) -> Edit:
        return add_unit if name not in edits else lambda tensor: add_unit(edits[name](tensor))

    changed = {name: then_add_unit(name) for name in explicit.values if name.endswith(_WRITTEN) or name in edits}
    values = explicit.edited(edits) if edits else explicit.values
    largest_move = dict.fromkeys(values, 0.0)
    for _ in range(_N_DRAWS):
        moved = explicit.edited(changed)
        for name, value in values.items():
            largest_move[name] = max(largest_move[name], largest_difference(moved[name], value))
    return largest_move


def table_rounding(
    probe: Probe, way: Way, explicit: ExplicitRun, edits: Mapping[str, Edit] = MappingProxyType({})
) -> Moves:
    """How far each tensor may be off because rotary angles are made in float32: as angles in float64 move it.

    Args:
        probe: the model.
        way: which sequences.
        explicit: the run, its angles made in float32.
        edits: measure in the run with these edits.
    """
    if not _makes_angles(probe.model.cfg):
        return dict.fromkeys(explicit.values, 0.0)
    finer = ExplicitRun(probe.model, way.batch, table_dtype=torch.float64)
    values, finer_values = (run.edited(edits) if edits else run.values for run in (explicit, finer))
    return {name: _ROUNDING_FACTOR * largest_difference(finer_values[name], value) for name, value in values.items()}


def _compare_bits(subject: str, found: Tensor, expected: Tensor) -> CheckResult:
    equal = same_bits(found, expected)
    measured = largest_difference(found, expected)
    message = "" if equal else "the logits must be bit-identical to those of the same calls without listeners"
    if not equal and measured == 0:
        # -0.0 for 0.0: no distance, but other bits.
        measured = float("nan")
    return CheckResult(check=WATCHING, subject=subject, measured=measured, bound=0.0, message=message)
