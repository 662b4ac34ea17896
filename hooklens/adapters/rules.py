"""Weight rules: how one tensor on disk becomes HookLens parameters, and back.

A rule is a pure permutation of entries, so `save(load(t))` is `t` bit for bit, and what is linear in the
weights (gradients, LoRA deltas, task vectors) travels through it exactly. Axis letters in patterns:
`n` heads, `h` d_head, `w` the width of values, `m` d_model, `f` neurons, `v` d_vocab, `e` experts, `s` the parameters
that lie in one tensor.

In names `{i}` is the layer. `{e}` counts tensors that are one parameter: what the rule says holds of each, and they are
stacked along the parameter's first axis.

A rule applies in the layers of a network that have its parameters: what a network has (biases, gates, norms, mixtures
in some layers) stands in its config alone. `when` is for names that differ by variant, and `part` for parameters that
one kind of part at the MLP's place calls like another (`"mlp"`, `"moe"`).

Logical shapes are the field's; `load` keeps every parameter's stored layout that of an `nn.Linear` weight,
so a rule that only renames axes gives a view and copies nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from hooklens.config import HookedConfig, MoEConfig
from hooklens.errors import UnsupportedModelError

Condition = Callable[[HookedConfig], bool]
RowOrder = Literal["grouped", "blocked"]


def applies_always(cfg: HookedConfig) -> bool:
    """The condition of a rule that has none."""
    return True


@runtime_checkable
class WeightRule(Protocol):
    """One tensor on disk and the HookLens parameters it holds."""

    @property
    def hub(self) -> str:
        """Name on disk, with `{i}` in the place of the layer and `{e}` in that of the number among several."""
        ...

    @property
    def ours(self) -> tuple[str, ...]:
        """HookLens names, with `{i}` in the place of the layer."""
        ...

    @property
    def when(self) -> Condition:
        """Whether a network of this config has its parameters in such a tensor."""
        ...

    @property
    def part(self) -> str | None:
        """The kind of part at the MLP's place that it is a rule of; None: of any."""
        ...

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Give the parameters named by `ours`, in that order, in their logical shapes."""
        ...

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Undo `load`; the result has the shape on disk and need not be contiguous."""
        ...


@dataclass(frozen=True)
class Copy:
    """One tensor that is one parameter, seen through an einops pattern.

    Attributes:
        hub: name on disk.
        name: HookLens name.
        pattern: `"disk axes -> logical axes"`; None keeps the shape.
        when: which configs have the tensor.
        part: the kind of part at the MLP's place that has it; None: any.
    """

    hub: str
    name: str
    pattern: str | None = None
    when: Condition = applies_always
    part: str | None = None

    @property
    def ours(self) -> tuple[str, ...]:
        """The one HookLens name."""
        return (self.name,)

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """View the tensor in its logical shape."""
        return (tensor if self.pattern is None else _rearrange(tensor, self.pattern, cfg),)

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """View the parameter in the shape it has on disk."""
        (parameter,) = parameters
        return parameter if self.pattern is None else _rearrange(parameter, _inverse(self.pattern), cfg)


@dataclass(frozen=True)
class Fused:
    """Several parameters of one shape in one tensor, seen through an einops pattern.

    Attributes:
        hub: name on disk.
        ours: HookLens names, in the order in which they lie in the tensor.
        pattern: `"disk axes -> s logical axes"`, where the axis `s` counts the parameters.
        blocks: how often the tensor repeats them, axis `b` of the pattern.
        when: which configs have the tensor.
        part: the kind of part at the MLP's place that has it; None: any.
    """

    hub: str
    ours: tuple[str, ...]
    pattern: str
    blocks: int = 1
    when: Condition = applies_always
    part: str | None = None

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """The parameters, views where the pattern allows; else copies that keep the order of the entries on disk."""
        disk, logical = (side.strip() for side in self.pattern.split("->"))
        apart = logical.replace("(", "").replace(")", "")
        sizes = {"s": len(self.ours), "b": self.blocks}
        pieces = _rearrange(tensor, f"{disk} -> {apart}", cfg, **sizes).unbind()
        if apart == logical:
            return pieces
        merge = f"{apart.removeprefix('s ')} -> {logical.removeprefix('s ')}"
        # Axes that are merged follow each other in a copy, whose entries lie in the order of the piece's.
        return tuple(rearrange(piece.clone(), merge) for piece in pieces)

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Put the parameters back into one tensor."""
        return _rearrange(torch.stack(parameters), _inverse(self.pattern), cfg, b=self.blocks)


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
        part: the kind of part at the MLP's place that has it; None: any.
    """

    hub: str
    ours: tuple[str, str, str]
    order: RowOrder
    when: Condition = applies_always
    part: str | None = None

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Split the rows: views, but for queries of which several stand together in a group."""
        if self.order == "blocked":
            return tuple(rearrange(part, "(n h) ... -> n ... h", h=cfg.d_head) for part in self._blocks(tensor, cfg))
        return tuple(
            rearrange(part, "n h ... -> n ... h")
            if part.shape[1] == cfg.d_head
            else rearrange(rearrange(part, "g s ... -> (g s) ..."), "(n h) ... -> n ... h", h=cfg.d_head)
            for part in self._groups(tensor, cfg)
        )

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Put the rows of the three parameters back into one tensor."""
        rows = [rearrange(part, "n ... h -> (n h) ...") for part in parameters]
        if self.order == "blocked":
            return torch.cat(rows)
        groups = [rearrange(part, "(g s) ... -> g s ...", g=cfg.n_kv_heads) for part in rows]
        return rearrange(torch.cat(groups, dim=1), "g s ... -> (g s) ...")

    @staticmethod
    def _groups(tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """The rows of each kind, `[group rows ...]`."""
        groups = rearrange(tensor, "(g s) ... -> g s ...", g=cfg.n_kv_heads)
        query_rows = cfg.n_heads // cfg.n_kv_heads * cfg.d_head
        return torch.split(groups, [query_rows, cfg.d_head, cfg.d_head], dim=1)

    @staticmethod
    def _blocks(tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """The rows of each kind."""
        kv_rows = cfg.n_kv_heads * cfg.d_head
        return torch.split(tensor, [cfg.n_heads * cfg.d_head, kv_rows, kv_rows])


@dataclass(frozen=True)
class RowPieces:
    """Rows of one tensor, `[rows, in]` or `[rows]`, in pieces of several sizes, of which parameters are made.

    Attributes:
        hub: name on disk.
        made_of: HookLens names, each with the pieces that it consists of, in the order in which it has them.
        pieces: all pieces, in the order on disk.
        sizes: rows of each.
        heads: the pieces stand in each head anew; parameters are `[head in rows]`, else `[in rows]`.
        when: which configs have the tensor.
        part: the kind of part at the MLP's place that has it; None: any.
    """

    hub: str
    made_of: tuple[tuple[str, tuple[str, ...]], ...]
    pieces: tuple[str, ...]
    sizes: Callable[[HookedConfig], Mapping[str, int]]
    heads: bool = False
    when: Condition = applies_always
    part: str | None = None

    @property
    def ours(self) -> tuple[str, ...]:
        """The HookLens names."""
        return tuple(name for name, _ in self.made_of)

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Split the rows; each parameter is contiguous in its stored layout."""
        sizes = self.sizes(cfg)
        rows = rearrange(tensor, "(n r) ... -> n r ...", n=cfg.n_heads if self.heads else 1)
        found = dict(zip(self.pieces, torch.split(rows, [sizes[piece] for piece in self.pieces], 1), strict=True))
        made = (torch.cat([found[piece] for piece in pieces], 1).movedim(1, -1) for _, pieces in self.made_of)
        return tuple(one if self.heads else one[0] for one in made)

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """Put the pieces back into one tensor."""
        sizes = self.sizes(cfg)
        found: dict[str, Tensor] = {}
        for parameter, (_, pieces) in zip(parameters, self.made_of, strict=True):
            rows = (parameter if self.heads else parameter[None]).movedim(-1, 1)
            found |= dict(zip(pieces, torch.split(rows, [sizes[piece] for piece in pieces], 1), strict=True))
        return torch.cat([found[piece] for piece in self.pieces], 1).flatten(0, 1)


@dataclass(frozen=True)
class Constant:
    """One tensor with a number that is no parameter and the same in every checkpoint, which transformers reads.

    Attributes:
        hub: name on disk.
        value: the number.
        beside: HookLens name of the parameter with which it stands: where that is, and in its dtype.
        when: which configs have the tensor.
        part: the kind of part at the MLP's place that has it; None: any.
    """

    hub: str
    value: float
    beside: str
    when: Condition = applies_always
    part: str | None = None

    @property
    def ours(self) -> tuple[str, ...]:
        """None."""
        return ()

    def load(self, tensor: Tensor, cfg: HookedConfig) -> tuple[Tensor, ...]:
        """Nothing, once the number is found to be the right one.

        Raises:
            UnsupportedModelError: it is another one.
        """
        # As near as it is in bfloat16, in which it may have been once.
        if not math.isclose(tensor.item(), self.value, rel_tol=2**-7):
            raise UnsupportedModelError(
                f"a tensor {self.hub!r} holds {tensor.item()}; expected {self.value}, the only value implemented"
            )
        return ()

    def save(self, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """The number."""
        return torch.tensor(self.value)


def parameters_beside(rule: WeightRule) -> tuple[str, ...]:
    """HookLens names of the parameters that a layer has where the rule applies."""
    return (rule.beside,) if isinstance(rule, Constant) else rule.ours


def _inverse(pattern: str) -> str:
    disk, logical = (side.strip() for side in pattern.split("->"))
    return f"{logical} -> {disk}"


def _rearrange(tensor: Tensor, pattern: str, cfg: HookedConfig, **sizes: int) -> Tensor:
    """Rearrange with the sizes of those axes that the pattern names."""
    sizes |= {"h": cfg.d_head, "w": cfg.d_head_v}
    if "e" in pattern:
        parts = cfg.mlp if isinstance(cfg.mlp, tuple) else (cfg.mlp,)
        sizes["e"] = next(part.n_experts for part in parts if isinstance(part, MoEConfig))
    return rearrange(tensor, pattern, **{axis: size for axis, size in sizes.items() if axis in pattern})


def is_stacked(rule: WeightRule) -> bool:
    """Whether the rule's parameters are made of several tensors."""
    return "{e}" in rule.hub


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
        """The shape of the rule's tensor in a layer, or of each of its tensors."""
        ours = tuple(self._shapes[name.format(i=layer)] for name in rule.ours)
        if is_stacked(rule):
            ours = tuple(shape[1:] for shape in ours)
        asked = (rule.hub, ours)
        if asked not in self._known:
            empty = tuple(torch.empty(shape, device="meta") for shape in ours)
            self._known[asked] = rule.save(empty, self._cfg).shape
        return self._known[asked]
