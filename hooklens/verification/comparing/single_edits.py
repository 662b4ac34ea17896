"""Edits of one head, one neuron and one position at a time, against a computation with the edit in its place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hooklens.axes import find_site, layer_of
from hooklens.hooks import HookPoint
from hooklens.verification.comparing.recomputing import compare_shown, largest, table_rounding, unit_rounding
from hooklens.verification.comparing.ways import Way, WayRun, ragged_mask, runs_in_pieces, share_prefix
from hooklens.verification.explicit import Batch, ExplicitNetwork, ExplicitRun
from hooklens.verification.explicit.network import LOGITS
from hooklens.verification.explicit.run import Edit
from hooklens.verification.probe import Probe, largest_difference
from hooklens.verification.report import CheckResult

SINGLE = "single edits give what an explicit computation gives"
CONSISTENT = "after single edits shown tensors are what their sources make"

# Each row of the batch has an edit of its own.
_N_ROWS = 12
_N_COLUMNS = 10
# Other orders of operations, in units of one rounding of all that enters the stream.
_ROUNDING_FACTOR = 64.0

# Points of a layer of which an edit at one makes the computation go on from copies beside the other.
_PAIRS = (
    ("ln1.hook_normalized", "hook_attn_in"),
    ("ln1.hook_scale", "hook_q_input"),
    ("ln1.hook_normalized", "hook_k_input"),
    ("ln1.hook_normalized", "hook_v_input"),
    ("ln1.hook_normalized", "hook_mlp_in"),
    ("hook_attn_in", "hook_q_input"),
    ("attn.hook_q_latent", "hook_q_input"),
    ("attn.kv_latent_norm.hook_scale", "hook_k_input"),
    ("attn.hook_kv_latent", "hook_v_input"),
    ("attn.hook_k_rope", "hook_k_input"),
    ("attn.hook_k", "attn.hook_k_per_head"),
    ("attn.hook_k_per_head", "attn.hook_rot_k"),
    ("attn.hook_k_per_head", "attn.k_norm.hook_normalized"),
    ("attn.hook_k_per_head", "attn.hook_v_per_head"),
    ("attn.hook_v", "attn.hook_pattern"),
    ("attn.hook_attn_scores", "attn.hook_pattern"),
    ("attn.hook_z", "attn.hook_result"),
)

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class _Bench:
    """A way of running, with what it gives without edits.

    Attributes:
        way, clean, explicit: the way, what it gives, and what the definitions give.
        sizes: the largest entry of each tensor.
        bounds: how far rounding may take each in relation to that.
    """

    way: Way
    clean: WayRun
    explicit: ExplicitRun | None
    sizes: dict[str, float]
    bounds: dict[str, float]


@dataclass(frozen=True)
class _RowEdits:
    """What is changed in each row of the last call's tensor: the entries at an index are scaled and moved."""

    regions: Sequence[Index]
    factor: float
    shift: Tensor

    def write(self, into: Tensor, source: Tensor) -> None:
        """Put the new values in their places."""
        for region in self.regions:
            into[region] = source[region] * self.factor + self.shift[region].to(source)


class SingleEdits:
    """Edits of single entries, a row of a batch for each.

    Args:
        probe: the model, in float64 where the logits are to be held against explicit ones.
        explicit: compute what is to come out from the tokens on. Without, what is shown after an edit is held against
            its sources, in the edit's layer.
    """

    def __init__(self, probe: Probe, *, explicit: bool) -> None:
        self._probe, self._explicit = probe, explicit

    @cached_property
    def _benches(self) -> list[_Bench]:
        probe = self._probe
        n = min(_N_COLUMNS, probe.n_tokens)
        generator = torch.Generator().manual_seed(probe.seed + 2)
        tokens = torch.randint(0, probe.model.cfg.d_vocab, (_N_ROWS, n), generator=generator).to(probe.model.device)
        ways = [Way(label="", batch=Batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool)), pieces=(n,))]
        if n == _N_COLUMNS and runs_in_pieces(probe):
            half = n // 2
            mask = ragged_mask(tokens, half)
            mask[:, :half] = True
            batch = Batch(tokens=share_prefix(tokens, half), mask=mask)
            ways.append(
                Way(label=" on a frozen prefix", batch=batch, pieces=(half, n - half), frozen=True, shares_prefix=True)
            )
        return [self._make_bench(way) for way in ways]

    def _make_bench(self, way: Way) -> _Bench:
        probe = self._probe
        clean = way.run(probe.model, capture=probe.names)
        if not self._explicit:
            return _Bench(way, clean, None, {}, {})
        explicit = ExplicitRun(probe.model, way.batch)
        tiny = torch.finfo(torch.float32).tiny
        sizes = {name: max(largest(value), tiny) for name, value in explicit.values.items()}
        return _Bench(way, clean, explicit, sizes, self._bounds(way, explicit, sizes, {}))

    def _bounds(
        self, way: Way, explicit: ExplicitRun, sizes: Mapping[str, float], edits: Mapping[str, Edit]
    ) -> dict[str, float]:
        """How far rounding may take each tensor in the run with some edits, in relation to its size without."""
        probe = self._probe
        units, tables = unit_rounding(probe, explicit, edits), table_rounding(probe, way, explicit, edits)
        in_logits = (probe.rounding + tables[LOGITS]) / sizes[LOGITS]
        # The logits may feel nothing of a tensor that moves much: scores of queries that see one key each, say.
        own = {name: (units[name] + tables[name]) / size for name, size in sizes.items()}
        eps = torch.finfo(probe.dtype).eps
        return {name: _ROUNDING_FACTOR * (max(in_logits, moves) + eps) for name, moves in own.items()}

    def check(self, name: str) -> Iterator[CheckResult]:
        """Edit every head, and the first, a middle and the last entry of every other axis at a hook point."""
        site = find_site(name)
        if site is None or site.position_axis is None or site.discrete:
            return
        for bench in self._benches:
            if bench.way.is_cached and not _reads_cache(name):
                continue
            shape = list(bench.clean.captures[name].shape)
            shape[site.position_axis] -= bench.way.n_before
            indices = list(_single_entries(site.axes, shape))
            for start in range(0, len(indices), _N_ROWS):
                regions = [(row, *index[1:]) for row, index in enumerate(indices[start : start + _N_ROWS])]
                yield from self._check_edits(name, bench, {name: self._make_edits(name, regions, shape)})

    def check_pairs(self) -> Iterator[CheckResult]:
        """Edit two points at once, where an edit at one of them has the computation take another way past the other.

        In the last of the layers that are checked: the ways are those of every layer.
        """
        for layer in sorted(self._probe.layers)[-1:]:
            for pair in _PAIRS:
                names = [f"blocks.{layer}.{own}" for own in pair]
                if not all(name in self._probe.names for name in names):
                    continue
                for bench in self._benches:
                    edits = {name: self._edit_everywhere(name, bench) for name in names}
                    yield from self._check_edits(" and ".join(names), bench, edits)

    def _edit_everywhere(self, name: str, bench: _Bench) -> _RowEdits:
        site = find_site(name)
        assert site is not None
        assert site.position_axis is not None
        shape = list(bench.clean.captures[name].shape)
        shape[site.position_axis] -= bench.way.n_before
        return self._make_edits(name, [(slice(None),) * len(shape)], shape)

    def _make_edits(self, name: str, regions: Sequence[Index], shape: Sequence[int]) -> _RowEdits:
        if name.endswith("hook_scale"):
            # A denominator stays above 0.
            return _RowEdits(regions, 1.5, torch.zeros(*shape, dtype=torch.float64))
        generator = torch.Generator().manual_seed(self._probe.seed)
        clean = self._benches[0].clean.captures[name].double()
        size = float(clean[clean.isfinite()].square().mean().sqrt())
        return _RowEdits(regions, 1.0, size * (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)))

    def _check_edits(self, name: str, bench: _Bench, edits: Mapping[str, _RowEdits]) -> Iterator[CheckResult]:
        way, model = bench.way, self._probe.model
        returned, in_place = ([(at, how(edit)) for at, edit in edits.items()] for how in (_return, _put_in_place))
        unwatched = way.run(model, hooks=returned)
        watched = way.run(model, hooks=in_place, capture=self._probe.names)
        subject = f"{name}{way.label}"
        if bench.explicit is None:
            yield from self._compare_with_sources(list(edits), subject, bench, unwatched, watched)
            return
        of_whole = {at: _edit_last_piece(at, way.n_before, edit) for at, edit in edits.items()}
        found = {f"{LOGITS}, unwatched": unwatched.logits, LOGITS: watched.logits, **watched.captures}
        expected = bench.explicit.edited(of_whole)
        result = self._compare_with_explicit(subject, bench, found, expected)
        if not result.passed:
            # An edit may make rounding larger than it was: a norm of next to nothing behind it, say.
            bounds = self._bounds(way, bench.explicit, bench.sizes, of_whole)
            result = self._compare_with_explicit(subject, replace(bench, bounds=bounds), found, expected)
        yield result

    def _compare_with_explicit(
        self, subject: str, bench: _Bench, found: dict[str, Tensor], expected: dict[str, Tensor]
    ) -> CheckResult:
        """The worst of the tensors that depend on the edit, each in relation to its size without edits."""
        assert bench.explicit is not None
        clean = bench.explicit.values
        severest, worst, offender = 0.0, 0.0, LOGITS
        for name, tensor in found.items():
            word = name.partition(",")[0]
            if word != LOGITS and expected[word] is clean[word]:
                continue
            off = largest_difference(tensor, expected[word]) / bench.sizes[word]
            if not off / bench.bounds[word] <= severest:
                severest, worst, offender = off / bench.bounds[word], off, name
        bound = bench.bounds[offender.partition(",")[0]]
        message = "" if worst <= bound else f"furthest off, in relation to its largest entry: {offender}"
        return CheckResult(check=SINGLE, subject=subject, measured=worst, bound=bound, message=message)

    def _compare_with_sources(
        self, edited: Sequence[str], subject: str, bench: _Bench, unwatched: WayRun, watched: WayRun
    ) -> Iterator[CheckResult]:
        bound, measured = self._probe.rounding, largest_difference(unwatched.logits, watched.logits)
        message = "" if measured <= bound else "returned and unwatched, or in place and watched: the logits differ"
        yield CheckResult(check=SINGLE, subject=subject, measured=measured, bound=bound, message=message)
        layer = layer_of(edited[0])
        names = [name for name in self._probe.names if name not in edited and layer_of(name) in (None, layer)]
        network = ExplicitNetwork(self._probe.model, bench.way.batch)
        results = list(
            compare_shown(
                network, names, watched.captures, f", edited at {subject}", check=CONSISTENT, seed=self._probe.seed
            )
        )
        failed = [result for result in results if not result.passed]
        yield from failed or sorted(results, key=lambda result: result.severity)[-1:]


def _reads_cache(name: str) -> bool:
    """Whether what happens at a point depends on how attention reads its keys."""
    return ".attn." in name or name.endswith(("hook_attn_in", "_input"))


def _single_entries(axes: tuple[str, ...], shape: Sequence[int]) -> Iterator[Index]:
    """Each head, and the first, a middle and the last entry of every other axis but the batch's."""
    for axis, (word, size) in enumerate(zip(axes, shape, strict=True)):
        if word in ("batch", "one"):
            continue
        entries = range(size) if word in ("head", "kv_head") else sorted({0, size // 2, size - 1})
        for entry in entries:
            yield (slice(None),) * axis + (entry,) + (slice(None),) * (len(axes) - axis - 1)


def _return(edits: _RowEdits) -> Callable[[Tensor, HookPoint], Tensor]:
    def hook_function(tensor: Tensor, hook: HookPoint) -> Tensor:
        edited = tensor.clone()
        edits.write(edited, tensor)
        return edited

    return hook_function


def _put_in_place(edits: _RowEdits) -> Callable[[Tensor, HookPoint], None]:
    def hook_function(tensor: Tensor, hook: HookPoint) -> None:
        edits.write(tensor, tensor)

    return hook_function


def _edit_last_piece(name: str, n_before: int, edits: _RowEdits) -> Callable[[Tensor], Tensor]:
    """The edit of the columns of the last call, on the activations of whole sequences."""
    site = find_site(name)
    assert site is not None
    axis = site.position_axis
    assert axis is not None

    def edit(whole: Tensor) -> Tensor:
        edited = whole.clone()
        columns = whole.shape[axis] - n_before
        edits.write(edited.narrow(axis, n_before, columns), whole.narrow(axis, n_before, columns))
        return edited

    return edit
