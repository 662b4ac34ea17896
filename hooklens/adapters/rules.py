"""Weight rules: how one tensor on disk becomes HookLens parameters, and back.

A rule is a pure permutation of entries, so `save(load(t))` is `t` bit for bit, and what is linear in the
weights (gradients, LoRA deltas, task vectors) travels through it exactly. Axis letters in patterns:
`n` heads, `h` d_head, `m` d_model, `f` d_mlp, `v` d_vocab. In names `{i}` is the layer.

Logical shapes are the field's; `load` keeps every parameter's stored layout that of an `nn.Linear` weight,
so a rule that only renames axes gives a view and copies nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from hooklens.config import HookedConfig

Condition = Callable[[HookedConfig], bool]
RowOrder = Literal["grouped", "blocked"]


def _always(cfg: HookedConfig) -> bool:
    return True


@runtime_checkable
class WeightRule(Protocol):
    """One tensor on disk and the HookLens parameters it holds."""

    @property
    def hub(self) -> str:
        """Name on disk, with `{i}` in the place of the layer."""

    @property
    def ours(self) -> tuple[str, ...]:
        """HookLens names, with `{i}` in the place of the layer."""

    @property
    def when(self) -> Condition:
        """Whether a network of this config has the tensor."""

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Give the parameters named by `ours`, in that order, in their logical shapes."""

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Undo `load`; the result has the shape on disk and need not be contiguous."""


@dataclass(frozen=True)
class Copy:
    """One tensor that is one parameter, seen through an einops pattern.

    Attributes:
        hub: name on disk.
        name: HookLens name.
        pattern: `"disk axes -> logical axes"`; None keeps the shape.
        when: which configs have the tensor.
    """

    hub: str
    name: str
    pattern: str | None = None
    when: Condition = _always

    @property
    def ours(self) -> tuple[str, ...]:
        """The one HookLens name."""
        return (self.name,)

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """View the tensor in its logical shape."""
        return (self._permute(tensor, self.pattern, cfg),)

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """View the parameter in the shape it has on disk."""
        (parameter,) = parameters
        if self.pattern is None:
            return parameter
        disk, logical = (side.strip() for side in self.pattern.split("->"))
        return self._permute(parameter, f"{logical} -> {disk}", cfg)

    @staticmethod
    def _permute(tensor: Tensor, pattern: str | None, cfg: HookedConfig) -> Tensor:
        if pattern is None:
            return tensor
        sizes = {"h": cfg.d_head} if "h" in pattern else {}
        return rearrange(tensor, pattern, **sizes)


@dataclass(frozen=True)
class FusedQKV:
    """Queries, keys and values in one tensor, weights `[rows, d_model]` or biases `[rows]`.

    Attributes:
        hub: name on disk.
        ours: HookLens names of query, key and value parameter.
        order: how rows are ordered. `"grouped"`: `(kv_head, [q ... q, k, v], d_head)`, the query heads that
            share a key-value head together with it (multi-head attention: groups of one; multi-query: one
            group). `"blocked"`: all queries, then all keys, then all values.
        when: which configs have the tensor.
    """

    hub: str
    ours: tuple[str, str, str]
    order: RowOrder
    when: Condition = _always

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Split the rows; each of the three is contiguous in its stored layout `[heads * d_head, ...]`."""
        split = self._split_grouped if self.order == "grouped" else self._split_blocked
        return tuple(rearrange(part, "(n h) ... -> n ... h", h=cfg.d_head) for part in split(tensor, cfg))

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Put the rows of the three parameters back into one tensor."""
        rows = [rearrange(part, "n ... h -> (n h) ...") for part in parameters]
        if self.order == "blocked":
            return torch.cat(rows)
        groups = [rearrange(part, "(g s) ... -> g s ...", g=cfg.n_kv_heads) for part in rows]
        return rearrange(torch.cat(groups, dim=1), "g s ... -> (g s) ...")

    @staticmethod
    def _split_grouped(tensor: Tensor, cfg: HookedConfig) -> list[Tensor]:
        groups = rearrange(tensor, "(g s) ... -> g s ...", g=cfg.n_kv_heads)
        query_rows = cfg.n_heads // cfg.n_kv_heads * cfg.d_head
        parts = torch.split(groups, [query_rows, cfg.d_head, cfg.d_head], dim=1)
        return [rearrange(part, "g s ... -> (g s) ...").contiguous() for part in parts]

    @staticmethod
    def _split_blocked(tensor: Tensor, cfg: HookedConfig) -> list[Tensor]:
        kv_rows = cfg.n_kv_heads * cfg.d_head
        return list(torch.split(tensor, [cfg.n_heads * cfg.d_head, kv_rows, kv_rows]))


def norm_rules(hub: str, name: str, *, bias: bool, when: Condition = _always) -> tuple[Copy, ...]:
    """The rules of one norm: `<hub>.weight` is `<name>.w` and, with a bias, `<hub>.bias` is `<name>.b`."""
    weight = Copy(f"{hub}.weight", f"{name}.w", when=when)
    return (weight, Copy(f"{hub}.bias", f"{name}.b", when=when)) if bias else (weight,)


def fused_qkv_rules(hub: str, attention: str, *, order: RowOrder) -> tuple[FusedQKV, FusedQKV]:
    """The rules of a fused map of `attention`: `<hub>.weight` and, with `cfg.qkv_bias`, `<hub>.bias`."""
    weights = (f"{attention}.W_Q", f"{attention}.W_K", f"{attention}.W_V")
    biases = (f"{attention}.b_Q", f"{attention}.b_K", f"{attention}.b_V")
    return (
        FusedQKV(f"{hub}.weight", weights, order),
        FusedQKV(f"{hub}.bias", biases, order, when=lambda cfg: cfg.qkv_bias),
    )


class DiskShapes:
    """The shapes that tensors have on disk, given the logical shapes of the parameters.

    Args:
        shapes: of all parameters by name.
        cfg: the network.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], cfg: HookedConfig) -> None:
        self._shapes = shapes
        self._cfg = cfg
        # Layers are alike, so most of the answers are known already.
        self._known: dict[tuple[object, ...], torch.Size] = {}

    def of(self, rule: WeightRule, layer: int) -> torch.Size:
        """The shape of the rule's tensor in a layer."""
        ours = tuple(self._shapes[name.format(i=layer)] for name in rule.ours)
        asked = (rule.hub, ours)
        if asked not in self._known:
            empty = tuple(torch.empty(shape, device="meta") for shape in ours)
            self._known[asked] = rule.save(empty, self._cfg).shape
        return self._known[asked]
