"""An adapter taken apart for the maps of a network, to be kept beside their weights, and put together again.

What is one map on disk (queries, keys and values, say) may be several in the network. `A` reads the input, so they all
share it; of `B`, of DoRA's lengths and of biases each takes the rows that its weight has of the tensor on disk. So the
sum of what the maps add is what the adapter adds, and the sum of their gradients in `A` is its gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.choice import choose_family
from hooklens.adapters.families import load_families
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.files.disk import TensorHeader
from hooklens.adapters.kept import Rows, find_rows
from hooklens.adapters.lora.adapter import LoraAdapter, LoraModule
from hooklens.adapters.lora.binding import LowRankChange, bind_adapter, name_tensors
from hooklens.adapters.rules import DiskShapes, is_stacked
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import UnsupportedModelError
from hooklens.weights.layout import logical_view, stored_view
from hooklens.weights.shapes import weight_shapes

_MERGE = "merge them into the weights: from_pretrained(base, adapter=folder, merge=True)"
_EXPERTS = "it holds the maps of all experts, which stand in no module of their own here"
_TIED = "it takes the place of an embedding and an unembedding that are tied to each other"
_HEAD, _TABLE = "unembed.W_U", "embed.W_E"


@dataclass(frozen=True, eq=False)
class KeptChange:
    """What an adapter adds beside one map of the network.

    Attributes:
        weight: HookLens name of the map's weight, in the numbering of the network.
        module: name of the module that the adapter names, which may hold several maps.
        rows: which of that module's outputs the map's are, in order.
        A: `[rank d_in]`, the same object for all maps of a module.
        B: `[d_out rank]`.
        scale: what their product is multiplied by.
        magnitude: DoRA's lengths, `[d_out]`; None: plain LoRA.
        bias: what is added, scaled, to the map's bias, `[d_out]`; None: nothing.
    """

    weight: str
    module: str
    rows: Rows
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class KeptWhole:
    """Tensors that an adapter puts in the place of those of the network's maps, which lie in one tensor on disk.

    Attributes:
        name: what the adapter calls that tensor.
        tensors: by HookLens name, in their stored shapes.
        hub: what the family calls it, and its rule takes apart.
        trains: it is trained with the adapter; not so an embedding that was saved along.
    """

    name: str
    tensors: Mapping[str, Tensor]
    hub: str
    trains: bool


@dataclass(frozen=True, eq=False)
class KeptAdapter:
    """An adapter taken apart for the maps of a network.

    Attributes:
        where: what to call it in texts of errors.
        config: the contents of its `adapter_config.json`.
        dropout: the share of a map's inputs that training leaves out of what `A` reads.
        rslora: the scale is `alpha / sqrt(rank)`.
        changes: what it adds, map by map.
        wholes: what it puts in the place of tensors.
        cfg: the checkpoint's network.
        layers: which of its blocks the network has; None: all.
    """

    where: str
    config: Mapping[str, Any]
    dropout: float
    rslora: bool
    changes: tuple[KeptChange, ...]
    wholes: tuple[KeptWhole, ...]
    cfg: HookedConfig
    layers: tuple[int, ...] | None

    def without_values(self) -> "KeptAdapter":
        """The same with tensors that have shapes and no values, once these lie in the network."""
        changes = [
            replace(
                one, A=one.A.to("meta"), B=one.B.to("meta"), magnitude=_forget(one.magnitude), bias=_forget(one.bias)
            )
            for one in self.changes
        ]
        wholes = [
            replace(one, tensors={name: tensor.to("meta") for name, tensor in one.tensors.items()})
            for one in self.wholes
        ]
        return replace(self, changes=tuple(changes), wholes=tuple(wholes))


def _forget(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("meta")


class _Shapes:
    """The names and shapes of a checkpoint's tensors, as its config says them."""

    def __init__(self, family: Family, cfg: HookedConfig) -> None:
        self._shapes = DiskShapes(weight_shapes(cfg), cfg)
        self._rules = {name: bound for bound in family.bind_rules(cfg) for name in bound.hubs}

    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._rules)

    def header(self, name: str) -> TensorHeader:
        """The shape of a tensor; what dtype a checkpoint has is not told by its config."""
        bound = self._rules[name]
        return TensorHeader("float32", tuple(self._shapes.of(bound.rule, bound.layer)))

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """There are none: this is the outline of a checkpoint, of which only names and shapes are asked."""
        raise NotImplementedError(name)


def keep_adapter(adapter: LoraAdapter, cfg: HookedConfig, layers: Sequence[int] | None = None) -> KeptAdapter:
    """Take an adapter apart for the maps of a network.

    Args:
        adapter: the adapter.
        cfg: the network of the checkpoint that it was made for.
        layers: which of its blocks the network has, in this order; None: all.

    Raises:
        CheckpointError: tensors of the adapter are those of no tensor of such a checkpoint, or do not fit it.
        UnsupportedModelError: something of it cannot be kept beside the weights; all is listed, with the reasons. Or
            the network was read from no checkpoint in Hugging Face format.
    """
    return _Keeping(adapter, cfg, layers).keep()


class _Keeping:
    """One adapter and one network, while the first is taken apart."""

    def __init__(self, adapter: LoraAdapter, cfg: HookedConfig, layers: Sequence[int] | None) -> None:
        self._adapter, self._cfg = adapter, cfg
        self._layers = None if layers is None else tuple(layers)
        if cfg.origin is None:
            raise UnsupportedModelError(
                f"{adapter.where}: the network was not read from a checkpoint in Hugging Face format, whose names "
                "an adapter's are; load the base in that format"
            )
        self._family = choose_family(cfg, load_families())
        self._rules = {name: bound for bound in self._family.bind_rules(cfg, layers) for name in bound.hubs}
        self._problems: dict[str, str] = {}
        # Layers are alike, so most of the answers are known already.
        self._rows: dict[tuple[str, tuple[int, ...], bool], list[Rows] | None] = {}

    def keep(self) -> KeptAdapter:
        adapter, where = self._adapter, f"a {self._family.name} model"
        bound = bind_adapter(adapter, self._family, self._cfg, _Shapes(self._family, self._cfg), where=where)
        given = dict.fromkeys([*(f"{one.name}.weight" for one in adapter.modules), *adapter.whole])
        named = name_tensors(self._family, given, where=adapter.where)
        modules = {one.name: one for one in adapter.modules}
        if adapter.config.get("ensure_weight_tying") and self._cfg.tied_unembed:
            self._refuse("ensure_weight_tying", "it changes the unembedding with the embedding that it is tied to")
        for tensor in bound.in_memory:
            self._refuse(tensor, _EXPERTS)
        changes: list[KeptChange] = []
        for tensor, change in bound.changes.items():
            module = modules[named[tensor].removesuffix(".weight")] if tensor in named else None
            if module is None:
                self._refuse(tensor, _EXPERTS)
            elif module.bias is not None and module.magnitude is not None:
                self._refuse(tensor, "it has DoRA's lengths of rows and a bias of its own, which PEFT scales, too")
            elif tensor in self._rules:
                changes += self._part(self._rules[tensor], change, module)
            elif tensor == self._family.head and self._cfg.tied_unembed:
                self._refuse(tensor, "the unembedding is tied to the embedding and has no weight of its own")
        wholes = []
        for tensor, value in bound.whole.items():
            trains = self._is_trained(named[tensor])
            if tensor in self._rules:
                parts = self._take_apart(self._rules[tensor], value, trains=trains)
                wholes.append(KeptWhole(name=named[tensor], tensors=parts, hub=tensor, trains=trains))
            elif tensor == self._family.head and self._cfg.tied_unembed:
                embedding = bound.whole.get(self._family.embedding)
                # Saved along with the embedding that it is tied to it is that.
                if trains or embedding is None or not torch.equal(value, embedding):
                    self._refuse(tensor, _TIED)
        self._raise()
        dropout = adapter.config.get("lora_dropout") or 0.0
        return KeptAdapter(
            where=adapter.where,
            config=adapter.config,
            dropout=float(dropout),
            rslora=adapter.settings.rslora,
            changes=tuple(changes),
            wholes=tuple(wholes),
            cfg=self._cfg,
            layers=self._layers,
        )

    def _part(self, bound: BoundRule, change: LowRankChange, module: LoraModule) -> Iterator[KeptChange]:
        """What a change of a tensor is of each map that it holds."""
        weights = self._weights(bound)
        found = None
        if is_stacked(bound.rule) or not all(map(_is_adaptable, weights)):
            self._refuse(change.tensor, "it is no linear map, and no embedding of tokens, of its own in the network")
            return
        if weights[0].name == _TABLE:
            found = [Rows(torch.arange(change.B.shape[0]), is_whole=True)]
        else:
            found = self._find_rows(bound, weights, change)
        if found is None:
            self._refuse(change.tensor, "its numbers lie in another order in the network, where rows are no rows of it")
            return
        for name, rows in zip(bound.ours, found, strict=True):
            yield KeptChange(
                weight=name,
                module=module.name,
                rows=rows,
                A=change.A,
                B=_take(change.B, rows),
                scale=change.scale,
                magnitude=None if change.magnitude is None else _take(change.magnitude, rows),
                bias=None if module.bias is None else _take(module.bias, rows),
            )

    def _find_rows(
        self, bound: BoundRule, weights: Sequence[DeclaredWeight], change: LowRankChange
    ) -> list[Rows] | None:
        shape = (change.B.shape[0], change.A.shape[1])
        asked = (bound.rule.hub, shape, change.turned)
        if asked not in self._rows:
            self._rows[asked] = find_rows(bound.rule, weights, self._cfg, shape, turned=change.turned)
        return self._rows[asked]

    def _weights(self, bound: BoundRule) -> list[DeclaredWeight]:
        # Layers of the network may be others than those of the checkpoint; a rule's names are of either.
        return [self._cfg.description.weights[name.format(i=bound.source_layer)] for name in bound.rule.ours]

    def _take_apart(self, bound: BoundRule, tensor: Tensor, *, trains: bool) -> dict[str, Tensor]:
        weights = self._weights(bound)
        if is_stacked(bound.rule) or not all(_is_adaptable(one) or _is_bias_of_map(one) for one in weights):
            self._refuse(bound.hubs[0], "it takes the place of a tensor that is no linear map's, nor an embedding's")
            return {}
        if self._cfg.tied_unembed and weights[0].name in (_TABLE, _HEAD) and trains:
            self._refuse(bound.hubs[0], _TIED)
            return {}
        loaded = bound.load(lambda _: tensor, self._cfg)
        return {
            name: stored_view(one, weight.stored, weight.axes)
            for name, one, weight in zip(bound.ours, loaded, weights, strict=True)
        }

    def _is_trained(self, name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        saved = self._adapter.config.get("modules_to_save") or ()
        return parameter == "bias" or any(module == one or module.endswith(f".{one}") for one in saved)

    def _refuse(self, subject: str, reason: str) -> None:
        self._problems[subject] = reason

    def _raise(self) -> None:
        if self._problems:
            listed = [f"{subject!r}: {reason}" for subject, reason in self._problems.items()]
            left_out = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
            raise UnsupportedModelError(
                f"{self._adapter.where}: merge=False, and not all of the adapter can be kept beside the weights: "
                f"{'; '.join(listed[:10])}{left_out}; {_MERGE}"
            )


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows.is_whole else tensor[rows.numbers.to(tensor.device)]


def _is_adaptable(weight: DeclaredWeight) -> bool:
    """Whether it is the weight of a linear map, or of the embedding of tokens."""
    if weight.name == _TABLE:
        return True
    is_map = weight.parameter.endswith(".weight") and len(weight.stored) == 2
    return is_map and not any(f".{other}." in weight.parameter for other in ("table", "router_proj"))


def _is_bias_of_map(weight: DeclaredWeight) -> bool:
    ends = weight.parameter.endswith(("_proj.bias", "unembed.proj.bias"))
    return ends and "router_proj" not in weight.parameter


def join_adapter(
    adapter: KeptAdapter, read_change: Callable[[KeptChange], KeptChange], read_whole: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that PEFT saves them with.

    Args:
        adapter: the adapter, whose tensors may have changed since.
        read_change: what a change holds now.
        read_whole: what stands in the place of a weight now, by HookLens name, in its stored shape.
    """
    joined: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for one in adapter.changes:
        sizes[one.module] = sizes.get(one.module, 0) + len(one.rows.numbers)
    for before in adapter.changes:
        now = read_change(before)
        is_table = now.weight == _TABLE
        roles = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        place = f"base_model.model.{now.module}."
        joined[place + roles[0]] = now.A
        of_rows = {roles[1]: now.B, "lora_magnitude_vector": now.magnitude, "lora_B.bias": now.bias}
        for role, tensor in of_rows.items():
            if tensor is not None:
                held = joined.setdefault(place + role, tensor.new_empty(sizes[now.module], *tensor.shape[1:]))
                held[now.rows.numbers.to(tensor.device)] = tensor
    weights, family = adapter.cfg.description.weights, choose_family(adapter.cfg, load_families())
    rules = {name: bound for bound in family.bind_rules(adapter.cfg, adapter.layers) for name in bound.hubs}
    for whole in adapter.wholes:
        parameters, bound = [], rules[whole.hub]
        for own, name in zip(whole.tensors, bound.rule.ours, strict=True):
            declared = weights[name.format(i=bound.source_layer)]
            parameters.append(logical_view(read_whole(own), declared.stored, declared.axes, declared.shape))
        module, _, parameter = whole.name.rpartition(".")
        # As PEFT calls what stands in the place of the weights of a map that it has adapters beside.
        place = f"{module}.base_layer" if module in sizes else module
        joined[f"base_model.model.{place}.{parameter}"] = bound.rule.save(tuple(parameters), adapter.cfg)
    return joined
