"""The memory plan of a call: what its weights, captures, cache and results take, and the most it holds at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.arguments import optional, read_flag, reads, require
from hooklens.causal_lm.calls import Input
from hooklens.causal_lm.memory.free import free_bytes
from hooklens.causal_lm.memory.replay import Replay, count_storages, find_tensors
from hooklens.causal_lm.memory.suggestions import Held, SiteBytes, Suggestion, suggest
from hooklens.causal_lm.model import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary, format_bytes, format_shape, merge_layers
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.weights.offloaded import lies_on_disk, offloaded_parameters, values_of

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MemoryPlan(Displayed):
    """What a call takes of memory, in bytes.

    Attributes:
        weights: what the model's weights take, which are there before the call; those on the disk take nothing.
        kv_cache: what the key-value cache takes after the call; 0 without one.
        sites: what is kept of each hook point.
        captured: what the capture keeps in all; memory that sites share counts once.
        output: what the call gives back: logits, a stream or a loss.
        forward: the most that the forward holds at once, what it keeps and gives back included.
        backward: the most that is held at once from the forward's end to the end of the backward pass, with what was
            kept for it; None where there is none.
        gradients: what the parameters' gradients take after the backward pass.
        peaks: by device the most that the call holds at once, besides what was there before it.
        free: by device what is free now, where that is known.
        suggestions: what to change to take less, by what it spares.
        notes: what was left out.
    """

    weights: int
    kv_cache: int
    sites: tuple[SiteBytes, ...]
    captured: int
    output: int
    forward: int
    backward: int | None
    gradients: int
    peaks: Mapping[torch.device, int]
    free: Mapping[torch.device, int]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of_peaks(
        cls, peaks: Mapping[torch.device, int], *, weights: int, output: int, notes: tuple[str, ...] = ()
    ) -> "MemoryPlan":
        """The plan of what keeps no activations and runs no backward pass.

        Args:
            peaks, weights, output, notes: as the attributes.
        """
        known = {device: free_bytes(device) for device in peaks}
        return cls(
            weights=weights,
            kv_cache=0,
            sites=(),
            captured=0,
            output=output,
            forward=max(peaks.values(), default=0),
            backward=None,
            gradients=0,
            peaks=peaks,
            free={device: size for device, size in known.items() if size is not None},
            suggestions=(),
            notes=notes,
        )

    @property
    def peak(self) -> int:
        """The most that the call holds at once, besides what was there before; of several devices, on the fullest."""
        return max(self.peaks.values(), default=0)

    @property
    def fits(self) -> bool:
        """Whether the free memory holds the call on each device; a device whose free memory is not known does."""
        return all(peak <= self.free.get(device, peak) for device, peak in self.peaks.items())

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per part of the memory: part, name, shape, dtype, bytes.

        The parts are `weights`, `kv_cache`, `site` (one row for each, without what it shares with one before it),
        `output`, `gradients`, and `peak of the forward`, `peak of the backward` and `free` for the whole.
        """
        rows: list[tuple[object, ...]] = [
            (part, "", None, None, size) for part, size in self._parts().items() if size is not None
        ]
        rows += [("site", site.name, site.shape, site.dtype, site.added) for site in self.sites]
        made: pandas.DataFrame = import_package("pandas").DataFrame(
            rows, columns=["part", "name", "shape", "dtype", "bytes"]
        )
        return made

    def _parts(self) -> dict[str, int | None]:
        return {
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "captured": self.captured,
            "output": self.output,
            "gradients": self.gradients,
            "peak of the forward": self.forward,
            "peak of the backward": self.backward,
        }

    def _summary(self) -> Summary:
        sites = merge_layers((site.name, (format_shape(site.shape), site.bytes, site.added)) for site in self.sites)
        rows = [
            (name, n, shape, format_bytes(n * size), format_bytes(n * added)) for name, (shape, size, added), n in sites
        ]
        told = {name: format_bytes(size) for name, size in self._parts().items() if size}
        free = ", ".join(f"{format_bytes(size)} on {device}" for device, size in self.free.items())
        changes = "; ".join(map(str, self.suggestions[:3]))
        verdict = "fits" if self.fits else "does not fit"
        return Summary(
            title=f"MemoryPlan: {format_bytes(self.peak)} beside weights of {format_bytes(self.weights)}, {verdict}",
            facts={**told, "free": free or "not known", "to take less": changes or None},
            listing=Listing(
                columns=("site", "layers", "shape", "bytes", "not shared"),
                rows=rows,
                what="kinds of sites",
                caption="what is kept",
            )
            if rows
            else None,
            notes=self.notes,
        )


@reads(
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    capture=read_flag,
    grad=optional(read_flag),
    backward=read_flag,
)
def plan(
    model: HookedCausalLM,
    input: Input,
    *,
    capture: bool = True,
    grad: bool | None = None,
    backward: bool = False,
    **call: Any,
) -> MemoryPlan:
    """What a call would take of memory, without running it.

    The call is gone through on a copy of the model whose tensors have shapes and no values; nothing of the model or
    of a key-value cache changes, and no memory of size is taken. What kernels use inside themselves is not seen.
    Hooks that are attached to the model are left out.

    Args:
        model: the model.
        input: as for a call.
        capture: keep activations, as `run_with_cache` does: without `names_filter` all but those on request. False
            plans a call of the model alone.
        grad: whether gradients are recorded; None: as torch is set here, and with `backward` they are.
        backward: a backward pass follows, from the loss or the sum of what comes back.
        **call: keywords of `run_with_cache` but for `fwd_hooks` and `bwd_hooks`, which are functions of values; with
            `capture=False` those of a call, `edits` and `splices`.

    Raises:
        InputError: arguments that the call would refuse, hooks, or a call that depends on values of activations.
        HookNameError, CacheError, EditError: as the call would.

    Example:
        >>> hooklens.plan(model, tokens, names_filter="resid_post", logits_at=-1).peak
    """
    hooks = [name for name in ("fwd_hooks", "bwd_hooks") if call.get(name)]
    if hooks:
        raise InputError(
            f"plan: {' and '.join(hooks)} hold functions of values, and a plan has none; leave them out, or give edits"
        )
    if backward and grad is False:
        raise InputError("plan: backward=True needs gradients, and grad=False records none; leave out one of them")
    if backward and call.get("incl_bwd"):
        raise InputError("plan: incl_bwd=True runs the backward pass itself; leave out backward=True")
    records = grad if grad is not None else backward or torch.is_grad_enabled()
    return _Planned(model, input, call, capture=capture, records=records, backward=backward).make()


class _Planned:
    """A call that is being planned."""

    def __init__(
        self, model: HookedCausalLM, input: Input, call: dict[str, Any], *, capture: bool, records: bool, backward: bool
    ) -> None:
        self.model, self.input, self.call = model, input, dict(call)
        # What drops the axis of the kept tensors looks at their addresses.
        self.drops_batch = bool(self.call.pop("remove_batch_dim", False))
        self.capture, self.records, self.backward = capture, records, backward
        self.replay = Replay(input.numel() if isinstance(input, Tensor) else 0)

    def make(self) -> MemoryPlan:
        """Go through the call."""
        model, replay = self.model, self.replay
        attached = [point.own for point in model.hook_points().values() if point.own is not None]
        # Ids and masks keep their values.
        plain = [one for name, one in self.call.items() if name not in ("edits", "splices", "past_kv_cache")]
        shared = [model.tokenizer, model.cfg, *attached, *plain]
        copied, input, call = replay.copy((model, self.input, self.call), shared=shared)
        for point in copied.hook_points().values():
            point.__dict__["own"] = None
        with replay.running(grad=self.records):
            output, kept = self._run(copied, input, call)
        brought = _count_brought(model)
        forward = _add(replay.peak, brought)
        peaks, after = forward, None
        held = self._sort_held(output, kept)
        if self.backward:
            replay.start_anew()
            with replay.running(grad=True):
                _go_back(output)
            after = _add(replay.peak, brought)
            peaks = {device: max(size, forward.get(device, 0)) for device, size in after.items()}
        cache = call.get("past_kv_cache")
        known = {device: free_bytes(device) for device in peaks}
        free = {device: size for device, size in known.items() if size is not None}
        main = max(peaks, key=lambda device: peaks[device], default=model.device)
        sites = [site for site, _ in held["sites"]]
        return MemoryPlan(
            weights=count_storages(
                values_of(one) for one in (*model.parameters(), *model.buffers()) if not lies_on_disk(one)
            ),
            kv_cache=0 if cache is None else count_storages(find_tensors(cache)),
            sites=tuple(sites),
            captured=sum(site.added for site in sites),
            output=count_storages(_tensors_of(output)),
            forward=max(forward.values(), default=0),
            backward=None if after is None else max(after.values(), default=0),
            gradients=count_storages(one.grad for one in copied.parameters() if one.grad is not None),
            peaks=peaks,
            free=free,
            suggestions=suggest(
                call,
                Held(
                    **held,
                    n_rows=_count_rows(self.input),
                    free=free.get(main),
                    peak=peaks.get(main, 0),
                    peak_if=lambda shares: replay.peak_if(shares).get(main, 0),
                ),
                model.device,
            ),
            notes=(f"hooks that are attached to {len(attached)} points of the model are left out",) * bool(attached),
        )

    def _sort_held(self, output: Any, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the storages are that a forward has left."""
        replay = self.replay
        sites = _list_sites(kept, drops_batch=self.drops_batch)
        of_sites = [replay.find_held([tensor]) for tensor in kept.values()]
        given = replay.find_held(_tensors_of(output))
        graph = replay.held - given.union(*of_sites) if self.records and not self._goes_back() else set()
        has_logits = isinstance(output, Tensor) and output.ndim == 3
        return {
            "sites": list(zip(sites, of_sites, strict=True)),
            "logits": given if has_logits else set(),
            "graph": graph,
            "n_reads": output.shape[1] if has_logits else 1,
        }

    def _goes_back(self) -> bool:
        return self.backward or bool(self.call.get("incl_bwd"))

    def _run(self, model: HookedCausalLM, input: Input, call: dict[str, Any]) -> tuple[Any, Mapping[str, Tensor]]:
        if not self.capture:
            return model.run_with_hooks(input, **call), {}
        options: dict[str, Any] = {**call, "check_memory": False}
        output, cache = model.run_with_cache(input, **options)
        return output, cache


def _count_brought(model: HookedCausalLM) -> dict[torch.device, int]:
    """By device the largest weight that lies elsewhere and is brought there for an operator."""
    brought: dict[torch.device, int] = {}
    for _, weight in offloaded_parameters(model):
        if weight.device.type != "cpu":
            brought[weight.device] = max(weight.nbytes, brought.get(weight.device, 0))
    return brought


def _add(peaks: Mapping[torch.device, int], brought: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """The peaks with what is brought beside them, which is at most one weight at a time."""
    return {device: peaks.get(device, 0) + brought.get(device, 0) for device in (*peaks, *brought)}


def _tensors_of(output: Any) -> list[Tensor]:
    """What a call gives: one tensor, logits and a loss, or nothing."""
    return [one for one in (output if isinstance(output, tuple) else (output,)) if one is not None]


def _go_back(output: Any) -> None:
    """Run the backward pass from what a call gave."""
    output = output[-1] if isinstance(output, tuple) else output
    if output is None:
        raise InputError("plan: backward=True starts from what the call gives, and return_type=None gives nothing")
    (output if output.ndim == 0 else output.sum()).backward()


def _count_rows(input: Input) -> int:
    if isinstance(input, Tensor):
        return input.shape[0] if input.ndim > 1 else 1
    many = isinstance(input, Sequence) and len(input) and isinstance(input[0], str | Sequence | Tensor)
    return len(input) if many and not isinstance(input, str) else 1


def _list_sites(kept: Mapping[str, Tensor], *, drops_batch: bool) -> tuple[SiteBytes, ...]:
    """What is kept of each point; a storage counts where it comes first."""
    n_rows = next((tensor.shape[0] for tensor in kept.values()), 1)
    if drops_batch and n_rows != 1:
        raise InputError(f"plan: remove_batch_dim=True needs a batch of one row, this one has {n_rows}; leave it out")
    seen: set[int] = set()
    sites = []
    for name, tensor in kept.items():
        storage = tensor.untyped_storage()
        added = 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        size, shape = tensor.numel() * tensor.itemsize, tuple(tensor.shape[drops_batch:])
        sites.append(SiteBytes(name=name, shape=shape, dtype=tensor.dtype, bytes=size, added=added))
    return tuple(sites)
