"""Queries, keys and values head by head: made by a linear map, edited for single query heads, joined with the past."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.hooks import Call
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention.attend import repeat_heads
from hooklens.model.parts.adapted import AdaptedMap
from hooklens.model.parts.part import apply_linear, is_plain

# The normed stream, the same for all heads or (edited per head) a copy for each.
HeadInput = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos _ d_model"]

# What queries, keys or values are made of: that, or in latent attention a latent of it.
HeadSource = Float[Tensor, "batch pos _"] | Float[Tensor, "batch pos _ _"]

PerHead = Float[Tensor, "batch pos head _"]


class EditedHeads(NamedTuple):
    """Keys and values that listeners changed for single query heads.

    Attributes:
        keys: after norm and rotation, `[batch pos head d_head]`; None: as they were.
        values: `[batch pos head d_head]`; None: as they were.
        plain: the unchanged keys after norm and rotation, `[batch pos kv_head d_head]`, where somebody listens there.
    """

    keys: Tensor | None
    values: Tensor | None
    plain: Tensor | None

    def take_over(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values to go on with, given the key-value heads'.

        What listeners in the norm or behind the rotation added to the keys is added to the changed ones, too, so that
        an edit or a gradient there still counts. Where they only look that is exactly 0.
        """
        if self.keys is not None:
            k = self.keys if self.plain is None else self.keys + repeat_heads(k - self.plain, self.keys.shape[2])
        return k, v if self.values is None else self.values


def join_past(past: HookedKeyValueCacheEntry, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Past + new keys and values; of the new ones either may have a head for each query head."""
    if k.shape[2] == v.shape[2] == past.past_keys.shape[2]:
        return past.append(k, v)
    keys, values = (
        torch.cat([repeat_heads(old, new.shape[2]).expand(len(new), -1, -1, -1), new], 1)
        for old, new in ((past.past_keys, k), (past.past_values, v))
    )
    return keys, values


def project_heads(
    x: HeadSource, linear: nn.Module | None, d_head: int, call: Call | None = None
) -> Float[Tensor, "batch pos heads d_head"]:
    """`x W + b` for each head, on one input for all heads or a copy for each.

    Args:
        x: the input.
        linear: the map.
        d_head: the width of a head.
        call: who listens to what adapters beside the map add; None: nobody.
    """
    assert linear is not None
    if x.ndim == 3:
        batch, n_pos, _ = x.shape
        # In a backward pass the map itself would part rows and positions again: a view more in each direction.
        flat = x.flatten(0, 1) if x.requires_grad and x.is_contiguous() and is_plain(linear) else x
        return apply_linear(linear, flat, call).view(batch, n_pos, -1, d_head)
    if is_plain(linear):
        own: dict[str, Tensor] = linear.__dict__["_parameters"]
        heads: Tensor = torch.einsum("bpnm,nhm->bpnh", x, own["weight"].view(-1, d_head, x.shape[-1]))
        bias = own["bias"]
        return heads if bias is None else heads + bias.view(-1, d_head)
    # Something stands around the map: all heads of every copy, of which each copy's own is taken.
    take = partial(_take_own_heads, d_head=d_head)
    return linear(x, call, shape=take) if isinstance(linear, AdaptedMap) else take(apply_linear(linear, x))


def _take_own_heads(each: Tensor, d_head: int) -> Float[Tensor, "batch pos heads d_head"]:
    """Of all heads of every copy, `[batch pos copy (heads d_head)]`, each copy's own."""
    heads = torch.unflatten(each, -1, (-1, d_head))
    return heads.diagonal(dim1=2, dim2=3).movedim(-1, 2)


def own_part(parameter: Tensor | None) -> Any:
    """What this process holds of a parameter that several share."""
    shared: Any = parameter
    return shared.to_local() if hasattr(shared, "to_local") else shared


def project_own_heads(x: PerHead, linear: nn.Module | None, d_head: int) -> PerHead:
    """`x W + b` of the heads that this process computes, on a copy of the input for each.

    Args:
        x: the copies of these heads.
        linear: the map, whose weight several processes share.
        d_head: the width of a head.
    """
    assert linear is not None
    weight, bias = own_part(linear._parameters["weight"]), own_part(linear._parameters["bias"])
    heads: Tensor = torch.einsum("bpnm,nhm->bpnh", x, weight.view(-1, d_head, x.shape[-1]))
    return heads if bias is None else heads + bias.view(-1, d_head)


def write_own_heads(z: PerHead, linear: nn.Module) -> PerHead:
    """What each head that this process computes writes to the stream, without the bias."""
    weight = own_part(linear._parameters["weight"])
    return torch.einsum("bpnh,mnh->bpnm", z, weight.view(len(weight), *z.shape[2:]))
