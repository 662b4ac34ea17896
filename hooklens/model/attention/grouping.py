"""Query heads that share keys and values, for kernels that want equally many heads of each."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Keys of so few numbers (4 MiB in float32) are copied for each query head: that costs less than more calls do.
_FEW_NUMBERS = 2**20


class HeadCalls:
    """How a kernel for equally many heads serves grouped queries, without a copy of many keys for each of them.

    The query heads of a group are more queries of their key-value head ("folded") where all of a group's queries see
    the same keys, or where the mask repeated for them is smaller than the keys. Else few keys are repeated for each
    query head; and with many there is a call for each key-value head, whose keys stand there for all its query heads
    with a stride of 0, or for each member of a group, whichever are fewer.

    Args:
        q: `[batch query head d]`.
        k: `[batch key kv_head d]`.
        mask: `[rows one some_query key]`.
        is_causal: later keys are hidden.

    Attributes:
        mask: what every call takes as its mask.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, *, is_causal: bool) -> None:
        self.n_heads, self.n_kv_heads = q.shape[2], k.shape[2]
        self.group = self.n_heads // self.n_kv_heads
        self.mask = mask
        self.way: Literal["same", "folded", "repeated", "by_kv_head", "by_member"]
        if self.group == 1:
            self.way = "same"
        elif not is_causal and (mask is None or mask.shape[2] == 1):
            self.way = "folded"
        elif mask is not None and mask.numel() * self.group <= k.numel():
            self.way = "folded"
            self.mask = mask.repeat_interleave(self.group, 2)
        elif k.numel() * self.group <= _FEW_NUMBERS:
            self.way = "repeated"
        else:
            self.way = "by_kv_head" if self.n_kv_heads <= self.group else "by_member"

    def split(self, x: Float[Tensor, "batch query head d"]) -> list[Float[Tensor, "batch _ _ d"]]:
        """Queries, or what has their heads, as each call takes them: `[batch head pos d]`."""
        if self.way == "folded":
            batch, n_query, _, width = x.shape
            members = x.reshape(batch, n_query, self.n_kv_heads, self.group, width).transpose(2, 3)
            return [members.reshape(batch, n_query * self.group, self.n_kv_heads, width).transpose(1, 2)]
        if self.way == "by_kv_head":
            return [heads.transpose(1, 2) for heads in torch.split(x, self.group, 2)]
        if self.way == "by_member":
            return [x[:, :, member :: self.group].transpose(1, 2) for member in range(self.group)]
        return [x.transpose(1, 2)]

    def join(self, results: list[Float[Tensor, "batch _ _ d"]]) -> Float[Tensor, "batch query head d"]:
        """The inverse of `split`."""
        if self.way == "folded":
            batch, _, rows, width = results[0].shape
            members = results[0].transpose(1, 2).reshape(batch, rows // self.group, self.group, self.n_kv_heads, width)
            return members.transpose(2, 3).reshape(batch, rows // self.group, self.n_heads, width)
        if self.way == "by_kv_head":
            return torch.cat(results, 1).transpose(1, 2)
        if self.way == "by_member":
            return torch.stack(results, 2).flatten(1, 2).transpose(1, 2)
        return results[0].transpose(1, 2)

    def split_sums(self, x: Float[Tensor, "batch head query"]) -> list[Float[Tensor, "batch _ _"]]:
        """Log-sums as each call takes them: `[batch head pos]`."""
        if self.way == "folded":
            batch, _, n_query = x.shape
            groups = x.reshape(batch, self.n_kv_heads, self.group, n_query).transpose(2, 3)
            return [groups.reshape(batch, self.n_kv_heads, n_query * self.group)]
        if self.way == "by_kv_head":
            return list(torch.split(x, self.group, 1))
        if self.way == "by_member":
            return [x[:, member :: self.group] for member in range(self.group)]
        return [x]

    def join_sums(self, results: list[Float[Tensor, "batch _ _"]]) -> Float[Tensor, "batch head query"]:
        """The inverse of `split_sums`."""
        if self.way == "folded":
            batch, _, rows = results[0].shape
            groups = results[0].reshape(batch, self.n_kv_heads, rows // self.group, self.group)
            return groups.transpose(2, 3).reshape(batch, self.n_heads, rows // self.group)
        if self.way == "by_kv_head":
            return torch.cat(results, 1)
        return torch.stack(results, 2).flatten(1, 2) if self.way == "by_member" else results[0]

    def split_keys(
        self, k: Float[Tensor, "batch key kv_head d"], v: Float[Tensor, "batch key kv_head d"]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values as each call takes them: `[batch head key d]`."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.way == "repeated":
            return [(k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1))]
        if self.way == "by_kv_head":
            shape = (-1, self.group, -1, -1)
            pairs = zip(torch.split(k, 1, 1), torch.split(v, 1, 1), strict=True)
            return [(k_i.expand(shape), v_i.expand(shape)) for k_i, v_i in pairs]
        return [(k, v)] * (self.group if self.way == "by_member" else 1)

    def join_keys(self, grads: list[Float[Tensor, "batch _ key d"]]) -> Float[Tensor, "batch key kv_head d"]:
        """The gradient of keys or values from those of each call."""
        if self.way == "repeated":
            batch, _, n_key, width = grads[0].shape
            return grads[0].reshape(batch, self.n_kv_heads, self.group, n_key, width).sum(2).transpose(1, 2)
        if self.way == "by_kv_head":
            return torch.cat([grad.sum(1, keepdim=True) for grad in grads], 1).transpose(1, 2)
        if self.way == "by_member":
            return torch.stack(grads).sum(0).transpose(1, 2)
        return grads[0].transpose(1, 2)


def by_group(x: Float[Tensor, "batch query head d"], n_kv_heads: int) -> Float[Tensor, "batch kv_head group_query d"]:
    """Queries of the heads that share a key-value head, one head after another."""
    batch, n_query, n_heads, width = x.shape
    heads = x.transpose(1, 2)
    if n_heads == n_kv_heads:
        return heads
    return heads.reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_query, width)


def from_groups(x: Float[Tensor, "batch kv_head group_query d"], n_heads: int) -> Float[Tensor, "batch query head d"]:
    """The inverse of `by_group`."""
    batch, n_kv_heads, rows, width = x.shape
    n_query = rows * n_kv_heads // n_heads
    return x.reshape(batch, n_heads, n_query, width).transpose(1, 2)
