r"""Maps with adapters beside their weights, and what those add shown at a hook point.

    x --- base_layer ------------------ (+) --- what the map gives
      \-- A -- B -- scale, lora_out ---/

An adapter is a low-rank map (LoRA, Hu et al. 2021, arXiv:2106.09685), or one with a magnitude for each output (DoRA,
Liu et al. 2024, arXiv:2402.09353); or it brings a tensor that takes the place of the map's own. The modules that hold
one are peft's; nothing of peft is imported here, see `hooklens.model.parts.adapted_layers`.

Which of several adapters act is the modules' own state (`set_adapter`), but for calls inside a `with` block of
`hooklens.hooks.call.switched`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooklens.errors import HookLensError
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.call import switched, thread_switches
from hooklens.model.parts.quantised import dense_weight

Shape = Callable[[Tensor], Tensor]


class AdapterSwitch:
    """Whose adapters are switched by `with` blocks: those of all maps of a model, which share one of these."""

    @contextmanager
    def only(self, names: tuple[str, ...]) -> Iterator[None]:
        """A `with` block inside of which these adapters act in the calls that the thread makes, and no others."""
        with switched(self, names):
            yield

    def chosen(self, otherwise: tuple[str, ...]) -> tuple[str, ...]:
        """The adapters that act in what the thread does now."""
        return thread_switches().get(self, otherwise)


class Adapted(nn.Module):
    """A map with adapters beside it: what is common to projections and tables.

    Attributes:
        switch: the model's.
        out_sizes: sizes of what the map gives, by axis, as its hook point shows it: head and d_head, say.
        hook_lora_out: what the acting adapters add together, 0 where none of them acts; None: no adapter adds here.
        replacements: tensors that stand in the place of the map's own, `"weight"` and `"bias"`, by adapter.
    """

    switch: AdapterSwitch
    out_sizes: Mapping[str, int]
    hook_lora_out: HookPoint | None
    replacements: nn.ModuleDict
    # Of peft's layers.
    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]

    def size_of(self, axis: str) -> int:
        """The size of an axis of what the map gives."""
        return self.out_sizes[axis]

    def acting(self, call: Call | None = None) -> Sequence[str]:
        """The adapters that act in a call, in their order; without one, in what the thread does now."""
        state: Any = self
        if state.disable_adapters or state.merged:
            return ()
        chosen = (thread_switches() if call is None else call.switches).get(self.switch)
        names: Sequence[str] = state.active_adapters if chosen is None else chosen
        return names

    def replaced(self, role: str, names: Sequence[str]) -> Tensor | None:
        """What the acting adapters have in the place of the map's own weight or bias; None: nothing."""
        for name in names:
            if name in self.replacements:
                found: Tensor | None = getattr(self.replacements[name], role, None)
                if found is not None:
                    return found
        return None

    def weight_in_use(self, names: Sequence[str]) -> Tensor:
        """The weight as it is multiplied with where no adapter adds anything, in plain numbers."""
        found = self.replaced("weight", names)
        return dense_weight(self.base_layer) if found is None else found

    def effective_weight(self) -> Tensor:
        """One weight that gives what the map and its acting adapters give together, without dropout; computed anew."""
        raise NotImplementedError

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with it."""
        names = self.acting()
        found = self.replaced("bias", names)
        bias: Tensor | None = getattr(self.base_layer, "bias", None) if found is None else found
        return bias

    def listens(self, call: Call | None) -> bool:
        """Whether somebody listens to what adapters add here."""
        point = self.hook_lora_out
        return call is not None and point is not None and call.hears(point)

    def _show(self, added: Tensor | None, like: Tensor, call: Call | None) -> Tensor | None:
        """What adapters add, as listeners leave it, in the shape that the point shows."""
        point = self.hook_lora_out
        if call is None or point is None or not call.hears(point):
            return added
        if added is not None:
            return point(added, call)
        nothing, changed = point.watch(torch.zeros_like(like), call)
        return nothing if changed else None


class AdaptedMap(Adapted):
    """A linear map with adapters beside it; mixed into peft's layer, whose parameters it computes with."""

    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict

    def forward(self, x: Tensor, call: Call | None = None, *, shape: Shape | None = None) -> Tensor:
        """What the map and the acting adapters give.

        Args:
            x: `[*axes into]`.
            call: who listens; None: no hook point fires.
            shape: what is taken of what the map makes, `[*axes out_of]`, and of what adapters add to it, and given
                back; None: all, `[*axes out_of]`.
        """
        names = self.acting(call)
        made = self._run_base(x, names)
        added = self._add(x, made, names)
        if shape is not None:
            made, added = shape(made), None if added is None else shape(added)
            added = self._show(added, made, call)
        elif self.listens(call):
            sizes = tuple(self.out_sizes.values())
            parted = None if added is None else torch.unflatten(added, -1, sizes)
            shown = self._show(parted, torch.unflatten(made, -1, sizes), call)
            added = None if shown is None else shown.flatten(-len(sizes))
        return made if added is None else (made + added).to(made.dtype)

    def change_by_listeners(self, x: Tensor, call: Call) -> Tensor | float:
        """What listeners make of what adapters add for an input, less that itself; the point fires."""
        if not self.listens(call):
            return 0.0
        own: Tensor = self(x)
        changed: Tensor = self(x, call)
        return changed - own

    def _run_base(self, x: Tensor, names: Sequence[str]) -> Tensor:
        weight, bias = self.replaced("weight", names), self.replaced("bias", names)
        if weight is None and bias is None:
            out: Tensor = self.base_layer(x)
            return out
        own: Any = self.base_layer
        return F.linear(x, dense_weight(own) if weight is None else weight, own.bias if bias is None else bias)

    def _base_in_use(self, acting: Sequence[str]) -> object:
        """What has the weight and bias that the base map computes with."""
        weight, bias = self.replaced("weight", acting), self.replaced("bias", acting)
        if weight is None and bias is None:
            return self.base_layer
        own: Any = self.base_layer
        return SimpleNamespace(weight=self.weight_in_use(acting), bias=own.bias if bias is None else bias)

    def _add(self, x: Tensor, made: Tensor, acting: Sequence[str]) -> Tensor | None:
        """What adapters add to what the base map makes, one after another; None: there are none."""
        layer: Any = self
        total: Tensor | None = None
        for name in acting:
            if name not in self.lora_A:
                continue
            a, b, scale, drop = self.lora_A[name], self.lora_B[name], self.scaling[name], self.lora_dropout[name]
            read = layer._cast_input_dtype(x, a.weight.dtype)
            if name in self.lora_magnitude_vector:
                # With dropout the base map is run again, on what is left of the input.
                drops = self.training and not isinstance(drop, nn.Identity)
                so_far = made if total is None else made + total
                one: Tensor = self.lora_magnitude_vector[name](
                    drop(read) if drops else read,
                    lora_A=a,
                    lora_B=b,
                    scaling=scale,
                    base_layer=self._base_in_use(acting),
                    base_result=None if drops else so_far,
                )
            else:
                one = b(a(drop(read))) * scale
            total = one if total is None else total + one
        return total

    def effective_weight(self) -> Tensor:
        """See `Adapted.effective_weight`."""
        names = self.acting()
        own = self.weight_in_use(names)
        weight = own
        for name in names:
            if name in self.lora_A:
                weight = weight + self._change(name)
                if name in self.lora_magnitude_vector:
                    weight = self._factor(name, own)[:, None] * weight
        return weight.to(own.dtype)

    def effective_bias(self) -> Tensor | None:
        """See `Adapted.effective_bias`."""
        names, bias = self.acting(), super().effective_bias()
        added: Tensor | None = None
        for name in names:
            own: Any = self.lora_B[name].bias if name in self.lora_B else None
            if own is not None:
                added = own * self.scaling[name] if added is None else added + own * self.scaling[name]
            if added is not None and name in self.lora_magnitude_vector:
                added = self._factor(name, self.weight_in_use(names)) * added
        if added is None:
            return bias
        return added if bias is None else (bias + added).to(bias.dtype)

    def _change(self, name: str) -> Tensor:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        change: Tensor = (b @ a) * self.scaling[name]  # type: ignore[operator]
        return change

    def _factor(self, name: str, own: Tensor) -> Tensor:
        """What DoRA multiplies each output by, of what its adapter and those before it give."""
        magnitude: Any = self.lora_magnitude_vector[name].weight
        factor: Tensor = magnitude / torch.linalg.norm(own + self._change(name), dim=1)
        return factor


class AdaptedTable(Adapted):
    """A table of vectors with adapters beside it; mixed into peft's layer."""

    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict

    def forward(self, rows: Tensor, call: Call | None = None) -> Tensor:
        """The vectors of some rows, with what the acting adapters add to them.

        Args:
            rows: `[*axes]`.
            call: who listens; None: no hook point fires.
        """
        names = self.acting(call)
        weight = self.replaced("weight", names)
        made: Tensor = self.base_layer(rows) if weight is None else F.embedding(rows, weight)
        total: Tensor | None = None
        for name in names:
            if name in self.lora_embedding_A:
                a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
                one = (F.embedding(rows, a.T) @ b.T) * self.scaling[name]
                if name in self.lora_magnitude_vector:
                    factor = self._factor(name, names)
                    so_far = made if total is None else made + total
                    one = (factor - 1) * so_far + factor * one
                total = one if total is None else total + one
        total = self._show(total, made, call)
        return made if total is None else (made + total).to(made.dtype)

    def effective_weight(self) -> Tensor:
        """See `Adapted.effective_weight`."""
        names = self.acting()
        own = self.weight_in_use(names)
        weight = own
        for name in names:
            if name in self.lora_embedding_A:
                change = self.lora_embedding_B[name] @ self.lora_embedding_A[name]
                weight = weight + change.T * self.scaling[name]
                if name in self.lora_magnitude_vector:
                    weight = weight * self._factor(name, names)
        return weight.to(own.dtype)

    def _factor(self, name: str, acting: Sequence[str]) -> Tensor:
        """What DoRA multiplies each entry of vectors by, given lengths over all of the table.

        As in peft no gradient flows through the lengths that they have.
        """
        with torch.no_grad():
            change = self.lora_embedding_B[name] @ self.lora_embedding_A[name]
            lengths = torch.linalg.norm(self.weight_in_use(acting).T + change * self.scaling[name], dim=1)
        magnitude: Tensor = self.lora_magnitude_vector[name].weight  # type: ignore[assignment]
        factor: Tensor = magnitude / lengths
        return factor


def adapted_maps(network: nn.Module) -> dict[str, Adapted]:
    """The maps of a network that have adapters beside them, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Adapted)}


def base_map(module: nn.Module | None) -> nn.Module:
    """The map itself, without the adapters that there may be beside it."""
    assert module is not None
    return module.base_layer if isinstance(module, Adapted) else module


def whole_weight(module: nn.Module) -> Tensor:
    """The weight `[out, in]` that a map multiplies with, in plain numbers: a quantised one's, an adapted one's."""
    weight: Any = module.effective_weight() if isinstance(module, Adapted) else dense_weight(module)
    # Where several processes share it.
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def refuse_adapters(network: nn.Module, what: str, error: type[HookLensError], *, otherwise: str) -> None:
    """Refuse what needs plain weights where a network has adapters beside them.

    Args:
        network: the network.
        what: is asked for, and why it cannot be done: the beginning of the text.
        error: the kind of error.
        otherwise: what to do.

    Raises:
        HookLensError: of that kind.
    """
    maps = adapted_maps(network)
    if maps:
        raise error(f"{what} (adapters are kept beside {len(maps)} maps, {next(iter(maps))!r} first); {otherwise}")
