"""Captured activations as a mapping from hook name to tensor, with what is needed to read them.

Many entries are one tensor under two names: the stream leaving a block is the stream entering the next.
Such aliases stay aliases in everything a cache gives: they are moved, converted, stored and counted once.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.activation_cache.arguments import choose
from hooklens.activation_cache.memory import Gathered, count_bytes, identify, take
from hooklens.activation_cache.missing import MissingActivationError, explain_missing
from hooklens.activation_cache.rows import check_positions, kept_positions, strip_padding
from hooklens.activation_cache.storage import read_cache, write_cache
from hooklens.arguments import read_int
from hooklens.axes import HOOK_SITES, find_site, get_act_name, layer_of
from hooklens.config import HookedConfig
from hooklens.display import (
    Displayed,
    Element,
    Listing,
    Summary,
    fold,
    format_bytes,
    format_numbers,
    format_shape,
    layer_of_name,
    merge_layers,
    table,
)
from hooklens.errors import CacheError, HookNameError, join_names, suggest_names
from hooklens.hooks.capture import GRAD
from hooklens.hooks.choice import Choice
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

Layer = SupportsIndex | str | None
Key = str | tuple[str] | tuple[str, Layer] | tuple[str, Layer, str | None]
"""A hook name, or a shorthand: `("pattern", 3)`, `("scale", 3, "ln1")`, `"k3"`."""

_COLUMNS = ("name", "axes", "shape", "dtype", "bytes")

AnyCache = TypeVar("AnyCache", bound="CapturedActivations")


class CapturedActivations(Displayed, Mapping[str, Tensor]):
    """Activations by hook name, with what is needed to read them; the base of `ActivationCache`.

    Full names and shorthands both work, see there. Iteration gives the full names in the order of capture. Two caches
    are equal only if they are the same object; compare their tensors instead.

    Attributes:
        cfg: the model's configuration.
        transforms: the weight-processing steps the model had been through.
        tokens: ids of the run, `[batch pos]`, the new tokens only; None if it started from a residual.
        attention_mask: 1 for tokens, 0 for padding; `[batch pos]`, or `[batch key]` for past + new tokens
            of a run with a key-value cache. None: nothing is padding.
        positions: columns of the run that were captured (`pos_slice`), counted from 0; None: all of them. Tokens
            and mask always cover the whole run.
        weights: the model's parameters by HookLens name, the very tensors; None after `load`.
        has_batch_dim: whether the activations have a batch axis. `tokens` and `attention_mask` always do.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        cfg: HookedConfig,
        transforms: tuple[str, ...] = (),
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: tuple[int, ...] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        has_batch_dim: bool = True,
    ) -> None:
        """Collect activations; the mapping is copied, the tensors are not.

        Raises:
            CacheError: tokens or mask have not the axes that the class describes, or differ in rows.
        """
        _check_inputs(tokens, attention_mask)
        self._tensors = _read_tensors(tensors)
        self.cfg = cfg
        self.transforms = transforms
        self.tokens = tokens
        self.attention_mask = attention_mask
        self.positions = positions
        self.weights = weights
        self.has_batch_dim = has_batch_dim

    # Mapping compares item by item, which has no truth value for tensors.
    __eq__ = object.__eq__

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __getitem__(self, key: Key) -> Tensor:
        """The activation under a full name or a shorthand.

        Raises:
            MissingActivationError: the model has no such activation, or it was not captured.
        """
        if isinstance(key, str) and key in self._tensors:
            return self._tensors[key]
        name = self._resolve_name(key)
        if name not in self._tensors:
            raise MissingActivationError(explain_missing(name, self, self.cfg))
        return self._tensors[name]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Activations are entries, not attributes: the error says how the one of that name is read."""
            hint = "" if name.startswith("_") else self._tell_entry(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}.{hint}")

    def _tell_entry(self, name: str) -> str:
        """How an activation is read, as the end of a message; where there is none of that name, what is like it."""
        word = name.removeprefix("hook_")
        for layer, key in ((None, f"{word!r}"), (0, f"{word!r}, layer")):
            try:
                get_act_name(word, layer)
            except HookNameError:
                continue
            return f" Activations are entries: cache[{key}]"
        return suggest_names(name, [one for one in dir(self) if not one.startswith("_")])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _summary(self) -> Summary:
        sizes = [f"{axis} {size}" for axis in ("batch", "pos") if (size := self._find_size(axis)) is not None]
        kinds = merge_layers((name, self._describe(name)) for name in self._tensors)
        rows = [
            (name, axes, shape, dtype, format_bytes(size) if n == 1 else f"{n:,} x {format_bytes(size)}")
            for name, (axes, shape, dtype, size), n in kinds
        ]
        layers = dict.fromkeys(map(layer_of_name, self._tensors))
        return Summary(
            title=f"ActivationCache({', '.join([f'{len(self)} activations', format_bytes(self.nbytes), *sizes])})",
            facts={
                "columns captured": None if self.positions is None else format_numbers(self.positions),
                "transforms": ", ".join(self.transforms) or None,
            },
            listing=Listing(columns=_COLUMNS, rows=rows, what="kinds of activations"),
            pages=[partial(self._fold_layer, layer) for layer in layers] if len(self) > len(rows) else [],
        )

    def _describe(self, name: str) -> tuple[str, str, str, int]:
        """Axes, shape, dtype and bytes of an activation."""
        tensor = self._tensors[name]
        written = str(tensor.dtype).removeprefix("torch.")
        return " ".join(self.axes_of(name) or ()), format_shape(tensor.shape), written, tensor.nbytes

    def _fold_layer(self, layer: int | None) -> Element:
        """The activations of one layer, or those outside the blocks, folded."""
        names = [name for name in self._tensors if layer_of_name(name) == layer]
        rows = [(name, *each, format_bytes(size)) for name in names for *each, size in [self._describe(name)]]
        where = "outside the blocks" if layer is None else f"layer {layer}"
        size = format_bytes(sum(self._tensors[name].nbytes for name in names))
        return fold(
            f"{where}: {len(names)} activations, {size}", table(_COLUMNS, rows, caption=f"activations, {where}")
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the activations keep alive; memory that several of them share counts once.

        A view counts with all of the memory it is a view of.
        """
        return count_bytes(self._tensors)

    def axes_of(self, name: str) -> tuple[str, ...] | None:
        """The axes of an activation here, in the words of `hooklens.axes`; None for points outside its grammar."""
        site = find_site(name.removesuffix(GRAD)) if isinstance(name, str) else None
        if site is None:
            return None
        return site.axes if self.has_batch_dim else tuple(axis for axis in site.axes if axis != "batch")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per activation: name, axes, shape, dtype, bytes (each by itself, aliases not deducted)."""
        columns = ["name", "axes", "shape", "dtype", "bytes"]
        rows = [
            (name, self.axes_of(name), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
            for name, tensor in self.items()
        ]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
        return table

    def to(self: AnyCache, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AnyCache:
        """The cache on another device or in another floating dtype; one copy per distinct tensor.

        Tensors that are there already are shared. Only floating activations change their dtype; tokens and
        mask follow to the device; the weights stay where the model has them.

        Raises:
            CacheError: the dtype is not a floating one, or there is no such device.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CacheError(f"ActivationCache.to: dtype is {dtype!r}; expected a floating one such as torch.float32")
        try:
            torch.empty(0, device=device)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise CacheError(
                f"ActivationCache.to: device is {device!r} ({reason}); expected a device that is here, such as 'cpu'; "
                "a dtype is given by name: to(dtype=...)"
            ) from error

        def convert(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._derive(self._map_tensors(convert), **self._map_inputs(lambda tensor: tensor.to(device=device)))

    def remove_batch_dim(self: AnyCache) -> AnyCache:
        """The cache of a batch of one without its batch axis (views); itself if that is gone already.

        Raises:
            CacheError: some activation has more than one row.
        """
        if not self.has_batch_dim:
            return self
        larger = [f"{name} {list(tensor.shape)}" for name, tensor in self.items() if tensor.shape[:1] != (1,)]
        if larger:
            raise CacheError(
                f"remove_batch_dim: the batch axis has not size 1 in {join_names(larger, limit=5)}; "
                "take one row first: cache.apply_slice_to_batch_dim(row)"
            )
        return self._derive(self._map_tensors(lambda _, tensor: tensor[0]), has_batch_dim=False)

    def apply_slice_to_batch_dim(self: AnyCache, rows: Choice) -> AnyCache:
        """The cache of some rows of the batch.

        A number takes one row and drops the batch axis; a slice or a list keeps it; None takes all. Evenly spaced
        ascending rows are views, others copies.

        Raises:
            CacheError: there is no batch axis, a row is out of range or named twice, or no row is selected.
        """
        batch = self._require_batch("apply_slice_to_batch_dim")
        indices, single = choose(rows, batch, what="rows", noun="rows in this cache")
        taken = self._derive(
            self._map_tensors(lambda _, tensor: take(tensor, 0, indices)),
            **self._map_inputs(lambda tensor: take(tensor, 0, indices)),
        )
        return taken.remove_batch_dim() if single else taken

    def unpad(self: AnyCache, row: SupportsIndex) -> AnyCache:
        """One row of the batch without its padding; the batch axis stays, with size 1.

        Positions that the attention mask marks 0 are taken out of the pos, query and key axes, wherever in
        the row they are. With a key-value cache the mask should cover past + new tokens, `[batch key]`; one
        that covers only the new tokens keeps all past keys. Without a mask nothing is padding.

        Raises:
            CacheError: there is no such row or no batch axis, the row is all padding (or all of it that was
                captured), an activation does not cover the captured positions of the run, or its axes are not in
                `hooklens.axes`.
        """
        batch = self._require_batch("unpad")
        number = read_int(row, what="unpad: row", error=CacheError)
        [index], _ = choose(number, batch, what="unpad: row", noun="rows in this cache")
        single = self.apply_slice_to_batch_dim(slice(index, index + 1))
        if single.attention_mask is None:
            return single
        return single._drop_padding(single.attention_mask[0].bool())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write activations, config, transforms, tokens and mask as one safetensors file.

        Each distinct tensor is stored once. The weights are not written, nor is the autograd graph.

        Raises:
            CacheError: the file cannot be written.
        """
        write_cache(path, self._tensors, self._record())

    @classmethod
    def load(cls: type[AnyCache], path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> AnyCache:
        """Read what `save` wrote; aliases are one tensor again, `weights` is None.

        Raises:
            CacheError: the file is missing, damaged, or not an activation cache of this format version.
        """
        return read_cache(path, cls, device=device)

    def with_weights(self: AnyCache, weights: Mapping[str, Tensor]) -> AnyCache:
        """The cache with weights to read it by, those of the model of the run (`model.named_weights()`).

        Whether they are is not checked here; `hooklens.analysis.connect_cache` checks both records.

        Raises:
            CacheError: the weights are no mapping.
        """
        if not isinstance(weights, Mapping):
            raise CacheError(f"with_weights: found a {type(weights).__name__}; expected model.named_weights()")
        return self._derive(self._tensors, weights=weights)

    def _derive(self: AnyCache, tensors: Mapping[str, Tensor], **changes: Any) -> AnyCache:
        """A cache of the same run with other tensors; `changes` are arguments of the constructor that change, too."""
        changes.setdefault("weights", self.weights)
        return type(self)(tensors, **{**self._record(), **changes})

    def _record(self) -> dict[str, Any]:
        """All that a cache is made of but tensors and weights, by keyword of the constructor."""
        kept = ("cfg", "transforms", "tokens", "attention_mask", "positions", "has_batch_dim")
        return {name: getattr(self, name) for name in kept}

    def _map_inputs(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        """Apply `change` to tokens and mask, where there are any."""
        inputs = {"tokens": self.tokens, "attention_mask": self.attention_mask}
        return {name: None if tensor is None else change(tensor) for name, tensor in inputs.items()}

    def gathered(self: AnyCache, device: torch.device | None = None) -> AnyCache:
        """This cache where its activations lie on one device, else one that brings what is read of it to `device`.

        Args:
            device: None: that of the first activation.
        """
        places = {tensor.device for tensor in self._tensors.values()}
        if len(places) < 2:
            return self
        together = copy(self)
        together._tensors = Gathered(self._tensors, next(iter(self.values())).device if device is None else device)
        return together

    def _map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply `change` once to each distinct tensor, so that aliases stay aliases."""
        changed: dict[object, Tensor] = {}
        tensors = {}
        for name, tensor in self.items():
            # Axes are part of the identity: what is done to a tensor may depend on them.
            identity = (identify(tensor), self.axes_of(name))
            if identity not in changed:
                changed[identity] = change(name, tensor)
            tensors[name] = changed[identity]
        return tensors

    def _find_size(self, axis: str) -> int | None:
        for name, tensor in self.items():
            axes = self.axes_of(name)
            if axes is not None and axis in axes and len(axes) == tensor.ndim:
                return tensor.shape[axes.index(axis)]
        if self.tokens is not None and (axis == "pos" or self.has_batch_dim):
            return self.tokens.shape[("batch", "pos").index(axis)]
        return None

    def _require_batch(self, method: str) -> int:
        if not self.has_batch_dim:
            raise CacheError(f"{method}: this cache has no batch axis; call it before remove_batch_dim")
        sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in self.values()}
        sizes |= {tensor.shape[0] for tensor in (self.tokens, self.attention_mask) if tensor is not None}
        if len(sizes) != 1:
            raise CacheError(f"{method}: the activations have batch sizes {sorted(sizes)}; expected a single one")
        return sizes.pop()

    def _drop_padding(self: AnyCache, mask: Bool[Tensor, " key"]) -> AnyCache:
        """Take the positions that `mask` rules out from a cache of one row."""
        if self.tokens is None and self.positions is not None:
            raise CacheError(
                f"unpad: the run began at a residual stream and only positions {list(self.positions)} were captured: "
                "without tokens it is not known which of them are padding; capture without pos_slice"
            )
        n_new = len(mask) if self.tokens is None else self.tokens.shape[1]
        new_mask = mask[len(mask) - n_new :]
        if not bool(new_mask.any()):
            raise CacheError("unpad: the attention mask rules out every position of this row; nothing would be left")
        columns = range(n_new) if self.positions is None else self.positions
        with_axes = {name: (tensor, self.axes_of(name)) for name, tensor in self.items()}
        check_positions(with_axes, n_captured=len(columns), n_new=n_new, n_masked=len(mask))
        kept = kept_positions(new_mask[list(columns)])
        if not kept:
            raise CacheError(
                f"unpad: of this row only positions {list(columns)} were captured (pos_slice), and all of them are "
                "padding; nothing would be left"
            )
        # Columns are counted without the padding from here on, as tokens and mask are.
        numbers = (new_mask.cumsum(0) - 1).tolist()
        return self._derive(
            self._map_tensors(lambda name, tensor: strip_padding(tensor, self.axes_of(name), kept, mask)),
            tokens=None if self.tokens is None else take(self.tokens, 1, kept_positions(new_mask)),
            attention_mask=None if self.attention_mask is None else take(self.attention_mask, 1, kept_positions(mask)),
            positions=None if self.positions is None else tuple(numbers[columns[place]] for place in kept),
        )

    def _resolve_name(self, key: Key) -> str:
        """The full name of a key, with `_grad` after it where the key asks for a gradient."""
        given: tuple[Any, ...] = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(given) <= 3 or not isinstance(given[0], str):
            raise MissingActivationError(
                f"{key!r} names no activation; expected a name, (name, layer) or (name, layer, module)"
            )
        word: str = given[0]
        layer, part = (*given[1:], None, None)[:2]
        point = word.removesuffix(GRAD)
        try:
            return get_act_name(point, layer, part, n_layers=self.cfg.n_layers) + word[len(point) :]
        except HookNameError as error:
            named_layer = str(layer_of(point) or 0)
            known = {template.replace("{i}", named_layer) for template in HOOK_SITES} | set(self)
            nearest = "" if "Did you mean" in str(error) else suggest_names(word, known)
            raise MissingActivationError(f"{error}{nearest}") from error


def _read_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping):
        raise CacheError(f"ActivationCache: found a {type(tensors).__name__}; expected tensors by hook name")
    wrong = [repr(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong:
        raise CacheError(f"ActivationCache: {', '.join(wrong[:5])}: expected a tensor under the name of a hook point")
    return dict(tensors)


def _check_inputs(tokens: Tensor | None, attention_mask: Tensor | None) -> None:
    for what, tensor, axes in (("tokens", tokens, "[batch pos]"), ("attention_mask", attention_mask, "[batch key]")):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.ndim != 2):
            found = f"has shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"is a {type(tensor).__name__}"
            raise CacheError(f"ActivationCache: {what} {found}; expected {axes}")
    if tokens is None or attention_mask is None:
        return
    if len(tokens) != len(attention_mask) or tokens.shape[1] > attention_mask.shape[1]:
        raise CacheError(
            f"ActivationCache: tokens have shape {list(tokens.shape)} and attention_mask {list(attention_mask.shape)}; "
            "expected the same rows, and a mask over the new tokens or over past + new"
        )
