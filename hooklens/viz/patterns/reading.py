"""The attention patterns of some heads, read from a cache or a tensor, with the tokens on both sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_int
from hooklens.axes import get_act_name, layer_of
from hooklens.errors import HookLensError, InputError

_ROUNDING = 1e-2
"""What a pattern in half precision can be off 0 and 1."""


@dataclass(frozen=True, eq=False)
class Patterns:
    """Attention patterns of heads over the same tokens.

    Attributes:
        values: `[head query key]`.
        heads: of each the layer, None where it is not known, and the number in its layer.
        queries, keys: the tokens as text.
        query_at: of each query the key that is the same token; ascending.
        first_key: the position of the first key in the run.
    """

    values: Float[Tensor, "head query key"]
    heads: tuple[tuple[int | None, int], ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    query_at: tuple[int, ...]
    first_key: int = 0

    def name(self, head: int) -> str:
        """A head in words."""
        layer, number = self.heads[head]
        return f"head {number}" if layer is None else f"layer {layer} head {number}"

    def query(self, place: int) -> tuple[int, str]:
        """A query's position in the run, and its token."""
        return self.first_key + self.query_at[place], self.queries[place]

    def key(self, place: int) -> tuple[int, str]:
        """A key's position in the run, and its token."""
        return self.first_key + place, self.keys[place]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """How many keys of each query can hold attention: those up to the query, where no head looks further."""
        places = torch.arange(len(self.keys))
        later = places > torch.tensor(self.query_at)[:, None]
        if bool((self.values.nan_to_num(0.0) * later).any()):
            return (len(self.keys),) * len(self.queries)
        return tuple(place + 1 for place in self.query_at)

    def window(self, most: int) -> "Patterns":
        """The first `most` queries, and as many keys up to the last of these."""
        queries = slice(0, min(len(self.queries), most))
        end = max(self.query_at[queries]) + 1 if len(self.keys) > most else len(self.keys)
        keys = slice(max(0, end - most), end)
        return replace(
            self,
            values=self.values[:, queries, keys],
            queries=self.queries[queries],
            keys=self.keys[keys],
            query_at=tuple(place - keys.start for place in self.query_at[queries]),
            first_key=self.first_key + keys.start,
        )


def read_patterns(
    given: Mapping[str, Tensor] | Tensor,
    layer: int | Sequence[int] | None,
    *,
    tokens: Sequence[str] | None,
    row: int,
    heads: Sequence[int] | None,
) -> Patterns:
    """The patterns of a cache, or of a tensor, with their tokens.

    Args:
        given: activations by hook name, or `[head query key]` or `[layer head query key]`.
        layer: which layers of a cache, or what those of a tensor are.
        tokens: one for each key, or one for each token of the run, which may have begun behind a prefix.
        row: of the batch of a cache.
        heads: which of each layer.

    Raises:
        InputError: other shapes, values that are no attention, or layers, heads or tokens that are not there.
    """
    mask, ids, columns = None, None, None
    if isinstance(given, Tensor):
        if given.ndim not in (3, 4) or not given.numel():
            raise InputError(
                f"attention: the patterns have the shape {list(given.shape)}; expected [head query key] or "
                "[layer head query key], none of them empty"
            )
        layered = given if given.ndim == 4 else given[None]
        numbers = _name_layers(layer, len(layered))
    else:
        numbers, layered = _take_layers(given, layer, row)
        has_rows = getattr(given, "has_batch_dim", True)
        mask, ids = (
            _take_row(getattr(given, name, None), row if has_rows else 0) for name in ("attention_mask", "tokens")
        )
        columns = getattr(given, "positions", None)
    values = layered.detach().float().cpu()
    chosen = _read_heads(heads, values.shape[1])
    _check(values)
    n_queries, n_keys = values.shape[-2:]
    n_run = len(ids) if ids is not None else n_queries if columns is None else n_keys
    n_past = n_keys - n_run
    if n_past < 0:
        raise InputError(f"attention: {n_run} queries look at {n_keys} keys; expected a key for each query at least")
    columns = range(n_run) if columns is None else columns
    if len(columns) != n_queries:
        raise InputError(
            f"attention: the patterns have {n_queries} queries of the {len(columns)} captured positions, and the cache "
            "does not say which (logits_at leaves some out); capture without logits_at, or give the tensor"
        )
    query_at = [n_past + column for column in columns]
    real = _find_real(mask, n_keys, n_past)
    kept_keys = real.nonzero()[:, 0].tolist()
    kept_queries = [place for place, key in enumerate(query_at) if real[key]]
    labels = _read_tokens(tokens, ids, n_keys=n_keys, n_past=n_past, kept=kept_keys)
    place_of = {key: place for place, key in enumerate(kept_keys)}
    return Patterns(
        values=values[:, chosen].flatten(0, 1)[:, kept_queries][:, :, kept_keys],
        heads=tuple((number, head) for number in numbers for head in chosen),
        queries=tuple(labels[place_of[query_at[place]]] for place in kept_queries),
        keys=labels,
        query_at=tuple(place_of[query_at[place]] for place in kept_queries),
    )


def _name_layers(layer: int | Sequence[int] | None, n_layers: int) -> list[int | None]:
    if layer is None:
        return [None] if n_layers == 1 else list(range(n_layers))
    numbers = [layer] if isinstance(layer, int) else list(layer)
    if len(numbers) != n_layers:
        raise InputError(f"attention: {len(numbers)} layers are named, and the patterns are those of {n_layers}")
    return [read_int(number, what="attention: layer", least=0) for number in numbers]


def _take_layers(
    cache: Mapping[str, Tensor], layer: int | Sequence[int] | None, row: int
) -> tuple[list[int | None], Float[Tensor, "layer head query key"]]:
    there = [
        number for name in cache if (number := layer_of(name)) is not None and name == get_act_name("pattern", number)
    ]
    if layer is None:
        numbers = sorted(there)
    else:
        given = [layer] if isinstance(layer, int) else list(layer)
        numbers = [read_int(number, what="attention: layer", least=0) for number in given]
    if not numbers:
        raise InputError(
            "attention: the cache holds no pattern; capture some: names_filter='blocks.*.attn.hook_pattern'"
        )
    taken = []
    for number in numbers:
        try:
            pattern = cache[get_act_name("pattern", number)]
        except KeyError as error:
            if isinstance(error, HookLensError):
                raise
            raise InputError(f"attention: no pattern of layer {number}; found those of layers {there}") from error
        if getattr(cache, "has_batch_dim", pattern.ndim == 4):
            if not -len(pattern) <= row < len(pattern):
                raise InputError(f"attention: row is {row}; the patterns have {len(pattern)} rows")
            pattern = pattern[row]
        taken.append(pattern.detach().float().cpu())
    shapes = {tuple(pattern.shape) for pattern in taken}
    if len(shapes) > 1:
        raise InputError(
            f"attention: layers differ in the shapes of their patterns, {sorted(shapes)}; show them one by one"
        )
    return list(numbers), torch.stack(taken)


def _take_row(given: Tensor | None, row: int) -> Tensor | None:
    return None if given is None else given[row].cpu()


def _read_heads(heads: Sequence[int] | None, n_heads: int) -> list[int]:
    if heads is None:
        return list(range(n_heads))
    outside = [head for head in heads if not 0 <= head < n_heads]
    if outside or not len(heads):
        raise InputError(f"attention: heads are {list(heads)}; expected some of 0 to {n_heads - 1}")
    return list(heads)


def _check(values: Tensor) -> None:
    finite = values[~values.isnan()]
    if finite.numel() and not (finite.min() >= -_ROUNDING and finite.max() <= 1 + _ROUNDING):
        raise InputError(
            f"attention: the values run from {float(finite.min()):.3g} to {float(finite.max()):.3g}; expected "
            "attention from 0 to 1; viz.grid shows other values"
        )


def _find_real(mask: Tensor | None, n_keys: int, n_past: int) -> Tensor:
    """Which keys are tokens and no padding; a mask covers all keys, or those of the run alone."""
    if mask is None:
        return torch.ones(n_keys, dtype=torch.bool)
    if len(mask) == n_keys:
        return mask.bool()
    return torch.cat([torch.ones(n_past, dtype=torch.bool), mask.bool()])


def _read_tokens(
    tokens: Sequence[str] | None, ids: Tensor | None, *, n_keys: int, n_past: int, kept: list[int]
) -> tuple[str, ...]:
    """A label of each key that is kept: its token, its id, or nothing where only its place is known."""
    if tokens is None:
        run = [""] * (n_keys - n_past) if ids is None else [str(token) for token in ids.tolist()]
        labels = [*[""] * n_past, *run]
        return tuple(labels[key] for key in kept)
    if isinstance(tokens, str):
        raise InputError("attention: tokens are a text; expected a list with the text of each token")
    read = list(map(str, tokens))
    n_new = sum(key >= n_past for key in kept)
    if len(read) == len(kept):
        return tuple(read)
    if len(read) == n_keys:
        return tuple(read[key] for key in kept)
    if n_past and len(read) in (n_new, n_keys - n_past):
        new = read if len(read) == n_new else [read[key - n_past] for key in kept if key >= n_past]
        return (*[""] * (len(kept) - n_new), *new)
    fitting = (len(kept), n_keys, *((n_new, n_keys - n_past) if n_past else ()))
    sizes = " or ".join(map(str, dict.fromkeys(fitting)))
    raise InputError(
        f"attention: {len(read)} tokens are given; expected {sizes}: one for each key, or for each new token"
    )
