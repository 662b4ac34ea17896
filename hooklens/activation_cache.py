"""`ActivationCache`: what a run captured, a mapping from hook name to tensor.

A cache knows the config, the transforms and the tokens of the run, and shares (never copies) the weights
of the model, but holds no model. It is immutable: every method that changes something gives a new cache,
whose tensors are views of the old ones wherever a view can say it.

Many entries are one tensor under two names: the stream leaving a block is the stream entering the next.
Such aliases stay aliases in everything a cache gives: they are moved, converted, stored and counted once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.axes import HOOK_SITES, find_site, get_act_name, layer_of
from hooklens.config import HookedConfig, LearnedPositions, RotaryPositions
from hooklens.errors import CacheError, HookNameError, join_names, suggest_names
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

Key = str | tuple[str] | tuple[str, int | None] | tuple[str, int | None, str | None]
"""A hook name, or a shorthand: `("pattern", 3)`, `("scale", 3, "ln1")`, `"k3"`."""

_GRAD = "_grad"
_FORMAT = "hooklens.activation_cache"
_FORMAT_VERSION = "1"


class MissingActivationError(CacheError, KeyError):
    """The cache holds no activation of that name; also a `KeyError`, as a mapping's callers expect."""

    # KeyError would show the message's repr.
    __str__ = Exception.__str__


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name, with what is needed to read them.

    Full names and shorthands both work: `cache["blocks.3.attn.hook_pattern"]`, `cache["pattern", 3]`,
    `cache["scale", 3, "ln1"]`, `cache["k3"]`, `cache["resid_pre", -1]`. The gradient of an activation is
    under its name with `_grad` after it: `cache["pattern_grad", 3]`. Iteration gives the full names in the
    order of capture. Two caches are equal only if they are the same object; compare their tensors instead.

    Attributes:
        cfg: the model's configuration.
        transforms: the weight-processing steps the model had been through.
        tokens: ids of the run, `[batch pos]`, the new tokens only; None if it started from a residual.
        attention_mask: 1 for tokens, 0 for padding; `[batch pos]`, or `[batch key]` for past + new tokens
            of a run with a key-value cache. None: nothing is padding.
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
        weights: Mapping[str, Tensor] | None = None,
        has_batch_dim: bool = True,
    ) -> None:
        """Collect activations; the mapping is copied, the tensors are not.

        Raises:
            CacheError: tokens or mask have not the axes that the class describes, or differ in rows.
        """
        _check_inputs(tokens, attention_mask)
        self._tensors = dict(tensors)
        self.cfg = cfg
        self.transforms = transforms
        self.tokens = tokens
        self.attention_mask = attention_mask
        self.weights = weights
        self.has_batch_dim = has_batch_dim

    # Mapping compares item by item, which has no truth value for tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, key: Key) -> Tensor:
        """The activation under a full name or a shorthand.

        Raises:
            MissingActivationError: the model has no such activation, or it was not captured.
        """
        if isinstance(key, str) and key in self._tensors:
            return self._tensors[key]
        name = self._resolve_name(key)
        if name not in self._tensors:
            raise MissingActivationError(self._explain_missing(name))
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        """Number of activations, their bytes, and the sizes of the batch and pos axes where these are known."""
        sizes = [f"{axis} {size}" for axis in ("batch", "pos") if (size := self._find_size(axis)) is not None]
        return f"ActivationCache({', '.join([f'{len(self)} activations', _format_bytes(self.nbytes), *sizes])})"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the activations keep alive; memory that several of them share counts once.

        A view counts with all of the memory it is a view of.
        """
        storages = {}
        for index, tensor in enumerate(self._tensors.values()):
            storage = tensor.untyped_storage()
            # Tensors without data (on the meta device) all have address 0.
            storages[tensor.device, storage.data_ptr() or -1 - index] = storage.nbytes()
        return sum(storages.values())

    def axes_of(self, name: str) -> tuple[str, ...] | None:
        """The axes of an activation here, in the words of `hooklens.axes`; None for points outside its grammar."""
        site = find_site(name.removesuffix(_GRAD))
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """The cache on another device or in another floating dtype; one copy per distinct tensor.

        Tensors that are there already are shared. Only floating activations change their dtype; tokens and
        mask follow to the device; the weights stay where the model has them.

        Raises:
            CacheError: the dtype is not a floating one.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise CacheError(f"ActivationCache.to: dtype is {dtype}; expected a floating one such as torch.float32")

        def convert(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._derive(
            self._map_tensors(convert),
            tokens=None if self.tokens is None else self.tokens.to(device=device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device=device),
        )

    def remove_batch_dim(self) -> "ActivationCache":
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

    def apply_slice_to_batch_dim(self, rows: int | slice | list[int]) -> "ActivationCache":
        """The cache of some rows of the batch.

        A number takes one row and drops the batch axis; a slice or a list keeps it. Evenly spaced ascending
        rows are views, others copies.

        Raises:
            CacheError: there is no batch axis, a row is out of range, or no row is selected.
        """
        batch = self._require_batch("apply_slice_to_batch_dim")
        indices = _select_rows(rows, batch)

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else _take(tensor, 0, indices)

        taken = self._derive(
            self._map_tensors(lambda _, tensor: _take(tensor, 0, indices)),
            tokens=take(self.tokens),
            attention_mask=take(self.attention_mask),
        )
        return taken.remove_batch_dim() if isinstance(rows, int) else taken

    def unpad(self, row: int) -> "ActivationCache":
        """One row of the batch without its padding; the batch axis stays, with size 1.

        Positions that the attention mask marks 0 are taken out of the pos, query and key axes, wherever in
        the row they are. With a key-value cache the mask should cover past + new tokens, `[batch key]`; one
        that covers only the new tokens keeps all past keys. Without a mask nothing is padding.

        Raises:
            CacheError: there is no such row or no batch axis, the row is all padding, an activation does not
                cover the positions of the run (`pos_slice`), or its axes are not in `hooklens.axes`.
        """
        [index] = _select_rows(row, self._require_batch("unpad"))
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
        stored: dict[str, Tensor] = {}
        place_of: dict[str, str] = {}
        first_name: dict[tuple[object, ...], str] = {}
        for name, tensor in self.items():
            place = first_name.setdefault(_identify(tensor), f"activation.{name}")
            place_of[name] = place
            if place not in stored:
                stored[place] = tensor
        for name, extra in (("tokens", self.tokens), ("attention_mask", self.attention_mask)):
            if extra is not None:
                stored[name] = extra
        header = {
            "cfg": self.cfg.to_dict(),
            "transforms": self.transforms,
            "has_batch_dim": self.has_batch_dim,
            "place_of": place_of,
        }
        metadata = {"format": "pt", _FORMAT: _FORMAT_VERSION, "header": json.dumps(header)}
        # A cache loaded from this path may still read from the file: write beside it and put it in its place.
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            save_file(_own_memory(stored), partial, metadata=metadata)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"cannot write the activation cache to {str(target)!r}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "ActivationCache":
        """Read what `save` wrote; aliases are one tensor again, `weights` is None.

        Raises:
            CacheError: the file is missing, damaged, or not an activation cache of this format version.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get(_FORMAT) != _FORMAT_VERSION:
                    raise CacheError(
                        f"{str(path)!r} is a safetensors file, but no activation cache of format version "
                        f"{_FORMAT_VERSION} (found {metadata.get(_FORMAT)!r}); expected what ActivationCache.save wrote"
                    )
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            header = json.loads(metadata["header"])
            return cls(
                {name: stored[place] for name, place in header["place_of"].items()},
                cfg=HookedConfig.from_dict(header["cfg"]),
                transforms=tuple(header["transforms"]),
                tokens=stored.get("tokens"),
                attention_mask=stored.get("attention_mask"),
                has_batch_dim=header["has_batch_dim"],
            )
        except CacheError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{str(path)!r} cannot be read as an activation cache ({type(error).__name__}: {error}); "
                "expected a file that ActivationCache.save wrote"
            ) from error

    def _derive(
        self,
        tensors: Mapping[str, Tensor],
        *,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        has_batch_dim: bool | None = None,
    ) -> "ActivationCache":
        """A cache of the same run with other tensors; what is None stays as it is."""
        return ActivationCache(
            tensors,
            cfg=self.cfg,
            transforms=self.transforms,
            tokens=self.tokens if tokens is None else tokens,
            attention_mask=self.attention_mask if attention_mask is None else attention_mask,
            weights=self.weights,
            has_batch_dim=self.has_batch_dim if has_batch_dim is None else has_batch_dim,
        )

    def _map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply `change` once to each distinct tensor, so that aliases stay aliases."""
        changed: dict[object, Tensor] = {}
        tensors = {}
        for name, tensor in self.items():
            # Axes are part of the identity: what is done to a tensor may depend on them.
            identity = (_identify(tensor), self.axes_of(name))
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

    def _drop_padding(self, mask: Bool[Tensor, " key"]) -> "ActivationCache":
        """Take the positions that `mask` rules out from a cache of one row."""
        n_new = len(mask) if self.tokens is None else self.tokens.shape[1]
        new_mask = mask[len(mask) - n_new :]
        if not bool(new_mask.any()):
            raise CacheError("unpad: the attention mask rules out every position of this row; nothing would be left")
        _check_positions(self, n_new=n_new, n_masked=len(mask))

        positions, masked_keys = _kept(new_mask), _kept(mask)

        def strip(name: str, tensor: Tensor) -> Tensor:
            for axis, word in enumerate(self.axes_of(name) or ()):
                if word in {"pos", "query"}:
                    tensor = _take(tensor, axis, positions)
                elif word == "key":
                    n_unmasked = tensor.shape[axis] - len(mask)
                    tensor = _take(tensor, axis, [*range(n_unmasked), *(n_unmasked + key for key in masked_keys)])
            return tensor

        return self._derive(
            self._map_tensors(strip),
            tokens=None if self.tokens is None else _take(self.tokens, 1, positions),
            attention_mask=None if self.attention_mask is None else _take(self.attention_mask, 1, masked_keys),
        )

    def _resolve_name(self, key: Key) -> str:
        """The full name of a key, with `_grad` after it where the key asks for a gradient."""
        given: tuple[object, ...] = key if isinstance(key, tuple) else (key,)
        word, layer, part = (*given, None, None)[:3]
        if not (
            isinstance(word, str) and isinstance(layer, int | None) and isinstance(part, str | None) and len(given) <= 3
        ):
            raise MissingActivationError(
                f"{key!r} names no activation; expected a name, (name, layer) or (name, layer, module)"
            )
        point = word.removesuffix(_GRAD)
        try:
            return get_act_name(point, layer, part, n_layers=self.cfg.n_layers) + word[len(point) :]
        except HookNameError as error:
            named_layer = str(layer_of(point) or 0)
            known = {template.replace("{i}", named_layer) for template in HOOK_SITES} | set(self)
            nearest = "" if "Did you mean" in str(error) else suggest_names(word, known)
            raise MissingActivationError(f"{error}{nearest}") from error

    def _explain_missing(self, name: str) -> str:
        point = name.removesuffix(_GRAD)
        reason = _why_absent(point, self.cfg)
        if reason is not None:
            return f"the model has no activation {point!r}: {reason}.{suggest_names(name, self)}"
        if name.endswith(_GRAD) and point in self:
            return f"the gradient of {point!r} was not captured; run with incl_bwd=True to have it"
        held = f"the cache holds {join_names(self, limit=8)}" if self else "the cache is empty"
        return f"activation {name!r} was not captured; {held}. Add {point!r} to names_filter to have it"


def _check_inputs(tokens: Tensor | None, attention_mask: Tensor | None) -> None:
    for what, tensor, axes in (("tokens", tokens, "[batch pos]"), ("attention_mask", attention_mask, "[batch key]")):
        if tensor is not None and tensor.ndim != 2:
            raise CacheError(f"ActivationCache: {what} has shape {list(tensor.shape)}; expected {axes}")
    if tokens is None or attention_mask is None:
        return
    if len(tokens) != len(attention_mask) or tokens.shape[1] > attention_mask.shape[1]:
        raise CacheError(
            f"ActivationCache: tokens have shape {list(tokens.shape)} and attention_mask {list(attention_mask.shape)}; "
            "expected the same rows, and a mask over the new tokens or over past + new"
        )


def _why_absent(point: str, cfg: HookedConfig) -> str | None:
    """Why a model of this config lacks a hook point of the grammar; None if it has it."""
    layer = layer_of(point)
    if layer is not None and layer >= cfg.n_layers:
        return f"it has {cfg.n_layers} layers, 0 to {cfg.n_layers - 1}"
    module, _, name = point.rpartition(".")
    module = module.rpartition(".")[2]
    conditions = {
        "hook_pos_embed": (isinstance(cfg.positions, LearnedPositions), "its positions are not learned vectors"),
        "hook_resid_mid": (cfg.wiring == "sequential", "its blocks are parallel"),
        "hook_rot_q": (isinstance(cfg.positions, RotaryPositions), "its positions are not rotary"),
        "hook_rot_k": (isinstance(cfg.positions, RotaryPositions), "its positions are not rotary"),
        "hook_pre_linear": (cfg.gated_mlp, "its MLPs are not gated"),
        "ln1": (cfg.norm_before, "it has no norms before its branches"),
        "ln2": (cfg.norm_before and not cfg.shared_norm, "its MLPs have no norm of their own"),
        "ln1_post": (cfg.norm_after, "it has no norms after its branches"),
        "ln2_post": (cfg.norm_after, "it has no norms after its branches"),
        "q_norm": (cfg.qk_norm is not None, "it has no query-key norm"),
        "k_norm": (cfg.qk_norm is not None, "it has no query-key norm"),
    }
    for part in (module, name):
        exists, reason = conditions.get(part, (True, ""))
        if not exists:
            return reason
    return None


def _identify(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensor objects exactly if they are the same elements of the same memory.

    `detach()` makes another object of the same tensor, so `id` would miss aliases. A tensor with an autograd
    history is not the same as one without.
    """
    if not tensor.numel() or not tensor.data_ptr():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, and no two in one storage."""
    seen = set()
    owned = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.nbytes:
            flat = flat.clone()
        seen.add(storage.data_ptr())
        owned[name] = flat
    return owned


def _select_rows(rows: int | slice | list[int], batch: int) -> range | list[int]:
    """The indices (from 0 on) of rows of the batch."""
    if isinstance(rows, slice):
        indices: range | list[int] = range(batch)[rows]
        if not indices:
            raise CacheError(f"rows {rows} select none of the {batch} rows of this cache")
        return indices
    wanted = [rows] if isinstance(rows, int) else rows
    outside = [row for row in wanted if isinstance(row, bool) or not -batch <= row < batch]
    if outside or not wanted:
        found = f"rows {outside} are not in this cache" if outside else "an empty list selects no rows"
        raise CacheError(f"{found}; it has {batch} rows, 0 to {batch - 1} (or -{batch} to -1 from the end)")
    return [row % batch for row in wanted]


def _check_positions(cache: ActivationCache, *, n_new: int, n_masked: int) -> None:
    """Refuse activations whose pos, query or key axis is not the whole of the run."""
    bad = []
    for name, tensor in cache.items():
        axes = cache.axes_of(name)
        if axes is None or len(axes) != tensor.ndim:
            bad.append(f"{name} {list(tensor.shape)}: its axes are not known")
            continue
        for word, size in zip(axes, tensor.shape, strict=True):
            if word in {"pos", "query"} and size != n_new:
                bad.append(f"{name}: {size} positions")
            # A mask over the new tokens only says nothing about the keys of the past.
            if word == "key" and (size < n_masked or size > n_masked > n_new):
                bad.append(f"{name}: {size} keys")
    if bad:
        raise CacheError(
            f"unpad: the run has {n_new} new positions and a mask over {n_masked}, which do not fit "
            f"{join_names(bad, limit=5)}; capture without pos_slice, and leave points outside the model's own out"
        )


def _kept(mask: Bool[Tensor, " pos"]) -> list[int]:
    return [index for index, keep in enumerate(mask.tolist()) if keep]


def _take(tensor: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """The entries of an axis: a view where the indices are evenly spaced and ascend, else a copy."""
    if len(indices) == tensor.shape[axis] and list(indices) == list(range(len(indices))):
        return tensor
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    evenly = step > 0 and all(later - earlier == step for earlier, later in pairwise(indices))
    if evenly:
        place: list[Any] = [slice(None)] * tensor.ndim
        place[axis] = slice(indices[0], indices[-1] + 1, step)
        return tensor[tuple(place)]
    return tensor.index_select(axis, torch.tensor(indices, device=tensor.device))


def _format_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
