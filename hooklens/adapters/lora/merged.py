"""The tensors of a checkpoint with adapters added to them, one by one, when they are asked for.

`W + s B A` is computed in float32, or in float64 where the weights, the adapter or the model that is loaded are of it,
and rounded once, to the dtype of the model: some outputs of a map at a time, so that little is in memory in that dtype.
PEFT merges in it, too, where it has loaded the base so. Of several adapters one is added after the other; what DoRA
measures lengths of is the base with its own change alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from hooklens.adapters.conversion import PaddedSource, TensorSource
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.files.disk import TensorHeader
from hooklens.adapters.lora.adapter import LoraAdapter
from hooklens.adapters.lora.binding import BoundAdapter, LowRankChange, bind_adapter, name_tensors
from hooklens.config import HookedConfig
from hooklens.errors import UnsupportedModelError, join_names
from hooklens.weights.lora import dora_factor, lora_delta

_MOST_AT_ONCE = 2**16
"""Entries of a tensor that are merged at once."""


class MergedTensors:
    """A checkpoint's tensors as they are with adapters merged.

    Args:
        source: the tensors of the base.
        adapters: what is added, in this order.
        family: what the base is of.
        cfg: its network.
        where: what to call it in texts of errors.
        dtype: in which the tensors are handed out; None: that of each.

    Attributes:
        unties: the base's unembedding is tied to the embedding, and an adapter changes only one of them, or the two
            unalike.

    Raises:
        CheckpointError: an adapter does not fit the base.
        UnsupportedModelError: two adapters take the place of the same tensor.
    """

    def __init__(
        self,
        source: TensorSource,
        adapters: Sequence[LoraAdapter],
        family: Family,
        cfg: HookedConfig,
        *,
        where: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source, self._family, self._cfg, self._dtype = source, family, cfg, dtype
        bound = [bind_adapter(one, family, cfg, source, where=where) for one in adapters]
        _refuse_doubled(bound, adapters)
        stored = name_tensors(family, source.names(), where=where)
        # By the name that the source has, or that a tied tensor is given when it goes its own way.
        self._known = {name: known for known, name in stored.items()}
        both = {family.embedding, family.head}
        are_stored = both <= stored.keys()
        self.unties = cfg.tied_unembed and any(
            both & one.names() and (are_stored or not _is_alike(one, family)) for one in bound
        )
        # What is tied lies on disk once; untied it is read for both.
        self._lent: dict[str, str] = {}
        if self.unties and not are_stored:
            (there,) = both & stored.keys()
            (absent,) = both - {there}
            self._lent[absent] = stored[there]
            self._known[absent] = absent
        self._changes = [_changes_of(one, family, cfg) for one in bound]
        self._bound = bound

    def names(self) -> Collection[str]:
        """Names of all tensors of the merged checkpoint."""
        return [*self._source.names(), *self._lent]

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor."""
        header = self._source.header(self._lent.get(name, name))
        return header if self._dtype is None else header._replace(dtype=str(self._dtype).removeprefix("torch."))

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, merged anew each time where an adapter changes it."""
        known = self._known.get(name, name)
        tensor = self._read_whole(known)
        if tensor is None:
            tensor = self._source.read(self._lent.get(name, name), apart=apart or self._is_changed(known))
        dtype = tensor.dtype if self._dtype is None else self._dtype
        return (self._merge(known, tensor, dtype) if self._is_changed(known) else tensor).to(dtype)

    def is_padding(self, name: str) -> bool:
        """Whether a tensor is a bias that means nothing, and no adapter gives it a meaning."""
        if name in self._lent or not isinstance(self._source, PaddedSource):
            return False
        return not self._is_changed(self._known.get(name, name)) and self._source.is_padding(name)

    def _read_whole(self, known: str) -> Tensor | None:
        return next((one.whole[known] for one in self._bound if known in one.whole), None)

    def _is_changed(self, known: str) -> bool:
        return any(known in changes for changes in self._changes) or any(known in one.biases for one in self._bound)

    def _merge(self, known: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        changes = [found[known] for found in self._changes if known in found]
        added = [one.biases[known] for one in self._bound if known in one.biases]
        parts = [
            tensor,
            *(bias for bias, _ in added),
            *(matrix for change in changes for matrix in (change.low_rank.A, change.low_rank.B)),
        ]
        made_in = reduce(torch.promote_types, [dtype, torch.float32, *(part.dtype for part in parts)])
        steps = [_add(bias.to(made_in) * scale) for bias, scale in added]
        steps += [change.prepare(made_in, self._cfg) for change in changes]
        merged = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        out_axis = _out_axis(tensor, turned=any(change.low_rank.turned for change in changes))
        for outputs in _blocks_of(tensor, out_axis):
            base = tensor[outputs].to(made_in)
            block = base
            for step in steps:
                block = step(block, base, outputs)
            merged[outputs] = block
        return merged


Outputs = tuple[slice, ...]
"""Some of the outputs of a map, as an index of the tensor that holds it."""

Step = Callable[[Tensor, Tensor, Outputs], Tensor]
"""Adds a change to some outputs of a map: what they are by now, what they are in the base, and which they are."""


def _add(change: Tensor) -> Step:
    return lambda merged, base, outputs: merged + change[outputs]


def _out_axis(tensor: Tensor, *, turned: bool) -> int:
    """The axis of a tensor along which the outputs of its map lie."""
    return tensor.ndim - 1 if turned or tensor.ndim == 1 else tensor.ndim - 2


def _blocks_of(tensor: Tensor, axis: int) -> Iterator[Outputs]:
    """The outputs of a map in blocks, of which each is small: what is computed on the way is as small."""
    size = tensor.shape[axis]
    n_outputs = max(1, _MOST_AT_ONCE * size // max(1, tensor.numel()))
    for start in range(0, size, n_outputs):
        yield (slice(None),) * axis + (slice(start, start + n_outputs),)


class _Change:
    """A change of one tensor on disk, which may be a part of a tensor that transformers has in memory.

    Args:
        low_rank: the change.
        rules: where it is one of a tensor in memory: the rule that takes that apart, the one that puts the tensor on
            disk together, and the number of the tensor among those that the latter stacks.
    """

    def __init__(self, low_rank: LowRankChange, rules: tuple[BoundRule, BoundRule, int] | None = None) -> None:
        self.low_rank, self._rules = low_rank, rules

    def prepare(self, dtype: torch.dtype, cfg: HookedConfig) -> Step:
        """What adds the change, to some outputs of the map at a time.

        Args:
            dtype: in which to compute.
            cfg: the whole checkpoint's config.
        """
        change = self.low_rank
        if self._rules is not None:
            return _add(self._take_apart(dtype, cfg))
        A, B = change.A.to(dtype), change.B.to(dtype)
        magnitude = None if change.magnitude is None else change.magnitude.to(dtype)

        def add(merged: Tensor, base: Tensor, outputs: Outputs) -> Tensor:
            chosen = outputs[-1]
            delta = lora_delta(A, B[..., chosen, :], change.scale)
            if magnitude is None:
                return merged + (delta.mT if change.turned else delta)
            factor = dora_factor((base.mT if change.turned else base) + delta, magnitude[chosen])
            return (merged + delta.mT) * factor.mT if change.turned else (merged + delta) * factor

        return add

    def _take_apart(self, dtype: torch.dtype, cfg: HookedConfig) -> Tensor:
        """The change of the tensor on disk: one expert's, of which alone the product is computed."""
        assert self._rules is not None
        in_memory, on_disk, piece = self._rules
        change = self.low_rank
        A, B = change.A.to(dtype), change.B.to(dtype)
        if change.A.ndim == 2:
            delta = lora_delta(A, B, change.scale)
            parameters = in_memory.rule.load(delta.mT if change.turned else delta, cfg)
            return on_disk.rule.save(_in_order(parameters, in_memory, on_disk), cfg)
        delta = lora_delta(A[piece], B[piece], change.scale)
        stored = delta.mT if change.turned else delta
        # The rules are those of all experts, so this one stands for each of them, without being copied.
        parameters = _in_order(in_memory.rule.load(stored.expand(len(A), -1, -1), cfg), in_memory, on_disk)
        return on_disk.rule.save(tuple(parameter[piece] for parameter in parameters), cfg)


def _in_order(parameters: Sequence[Tensor], found: BoundRule, wanted: BoundRule) -> tuple[Tensor, ...]:
    """Parameters of one rule in the order in which another has them."""
    by_name = dict(zip(found.ours, parameters, strict=True))
    return tuple(by_name[name] for name in wanted.ours)


def _changes_of(bound: BoundAdapter, family: Family, cfg: HookedConfig) -> Mapping[str, _Change]:
    """An adapter's changes of tensors on disk, by name."""
    changes = {name: _Change(change) for name, change in bound.changes.items()}
    if bound.in_memory:
        sources = {name: found for found in bound.in_memory.values() for name in found[1].ours}
        for rule in family.bind_rules(cfg):
            found = sources.get(rule.ours[0]) if rule.ours else None
            if found is not None:
                for piece, name in enumerate(rule.hubs):
                    changes[name] = _Change(found[0], (found[1], rule, piece))
    return changes


def _is_alike(bound: BoundAdapter, family: Family) -> bool:
    """Whether an adapter does to the unembedding what it does to the embedding."""
    ours, theirs = bound.changes.get(family.embedding), bound.changes.get(family.head)
    if (ours is None) != (theirs is None) or (family.embedding in bound.whole) != (family.head in bound.whole):
        return False
    if ours is not None and theirs is not None:
        is_same = ours.scale == theirs.scale and torch.equal(ours.A.T, theirs.B) and torch.equal(ours.B.T, theirs.A)
        if not is_same or ours.magnitude is not None or theirs.magnitude is not None:
            return False
    return family.head not in bound.whole or torch.equal(bound.whole[family.embedding], bound.whole[family.head])


def _refuse_doubled(bound: Sequence[BoundAdapter], adapters: Sequence[LoraAdapter]) -> None:
    first: dict[str, Tensor] = {}
    doubled = []
    for one in bound:
        for name, tensor in one.whole.items():
            if not torch.equal(first.setdefault(name, tensor), tensor):
                doubled.append(name)
    if doubled:
        raise UnsupportedModelError(
            f"adapters {join_names([one.where for one in adapters])}: several hold {join_names(doubled)} whole, as "
            "tensors that take the place of the base's, and these cannot be added up; merge one of them"
        )
