"""What a part says of itself as class attributes: its weights, its hook points, the parts inside it."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

from torch import Tensor, nn

from hooklens.axes import HookSite
from hooklens.errors import ConfigError
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.quantised import dense_weight, is_quantised
from hooklens.model.parts.stacked import QuantisedStack, StackedLinear
from hooklens.weights.layout import logical_view, parse_stored, stored_view
from hooklens.weights.offloaded import OffloadedTensor, explain_change

if TYPE_CHECKING:
    from hooklens.model.parts.part import Part

Arguments = ParamSpec("Arguments")
Spec = Any
"""What a part is built from: a `BlockConfig` inside blocks, a `HookedConfig` outside, a `NormSpec` for norms."""


class When:
    """Whether a network has something.

    Args:
        condition: the question, asked of the part's spec.
        absent: why a network does not have it, as it ends the sentence "the model has none: ...".
        also: what else has to hold; of several reasons the first of these is told.
    """

    def __init__(self, condition: Callable[[Spec], bool], absent: str, *also: "When") -> None:
        self._condition, self._absent, self._also = condition, absent, also

    def why_not(self, spec: Spec) -> str | None:
        """Why a network does not have it; None where it does."""
        for one in self._also:
            if (reason := one.why_not(spec)) is not None:
                return reason
        return None if self._condition(spec) else self._absent

    def holds(self, spec: Spec) -> bool:
        """Whether a network has it."""
        return self.why_not(spec) is None


ALWAYS = When(lambda spec: True, "")


class Declared:
    """Something that a part declares; `name` is the attribute."""

    name: str = ""
    when: When

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, part: Any, owner: type) -> Any:
        if part is None:
            return self
        # Python then asks `Part.__getattr__`, which says why.
        raise AttributeError(self.name)


def _declare(kind: Callable[Arguments, Declared]) -> Callable[Arguments, Any]:
    """A class as type checkers see it: the attribute that it declares has the type of its annotation."""
    return kind


@dataclass
class Point(Declared):
    """A hook point.

    Args:
        axes: words of `hooklens.axes.AXES`; "..." stands for the axes of a norm's input.
        description: what the tensor is, in one line.
        on_request: expensive, so left out of "cache everything".
        repeats: the point whose key-value heads this one repeats for each query head.
        shared: the tensor is used at another place, too, which an edit must not reach.
        when: whether a network has it.
        discrete: its numbers name something, experts for example; there is nothing between two of them.
    """

    axes: str
    description: str
    _: KW_ONLY
    on_request: bool = False
    repeats: str | None = None
    shared: bool = False
    when: When = ALWAYS
    discrete: bool = False

    def site(self, path: str, norm_axes: str = "", where: str = "") -> HookSite:
        """What the point carries, under the name that it has in a part at a path."""
        prefix = f"{path}." if path else ""
        axes = (
            [*norm_axes.split()[:-1], "one"] if self.axes == "... one" else self.axes.replace("...", norm_axes).split()
        )
        return HookSite(
            template=prefix + self.name,
            axes=tuple(axes),
            description=f"{where}: {self.description}" if where else self.description,
            on_request=self.on_request,
            repeats=None if self.repeats is None else prefix + self.repeats,
            discrete=self.discrete,
        )


point = _declare(Point)


@dataclass
class Weight(Declared):
    """A weight under the field's name.

    On a part it is a view in the logical shape, or the parameter itself where that lies in memory so.

    Args:
        axes: of its logical shape, `"head d_model d_head"`.
        stored: the axes as they lie in memory, merged ones in brackets: `"(head d_head) d_model"`. None: as `axes`.
        module: the attribute of the `nn.Linear` (`nn.Embedding`, `StackedLinear`) that holds it; None: a parameter of
            the part.
        reads: its `d_model` axis is multiplied with the part's input.
        writes: what it gives is the part's output.
        bias: the name of the bias of this map.
        when: whether a network has it.
        fresh: what its entries are in a new network; None: biases are 0, and other weights are drawn.
    """

    axes: str
    stored: str | None = None
    _: KW_ONLY
    module: str | None = None
    reads: bool = False
    writes: bool = False
    bias: str | None = None
    when: When = ALWAYS
    fresh: float | None = None

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a map."""
        return self.name.startswith("b_")

    @property
    def held_as(self) -> str:
        """The name of the parameter that holds it, in its module."""
        if self.module is None:
            return self.name
        return "bias" if self.is_bias else "weight"

    @property
    def layout(self) -> tuple[tuple[str, ...], ...]:
        """The stored axes, each with the axes merged in it."""
        return parse_stored(self.stored or self.axes)

    def __get__(self, part: Any, owner: type) -> Any:
        if part is None:
            return self
        if self.module is None:
            return part._parameters[self.name] if self.name in part._parameters else super().__get__(part, owner)
        shape = part.shapes.get(self.name)
        if shape is None:
            return None if self.is_bias else super().__get__(part, owner)
        holder = part._modules[self.module]
        if not isinstance(holder, nn.Linear | nn.Embedding | StackedLinear | QuantisedStack | Adapted):
            raise ConfigError(
                f"{self.name}: a {type(holder).__name__} stands in the place of {self.module}, and a weight in it is "
                "not the map that it computes (an adapter, a quantised weight); merge the adapter or dequantise first "
                "to read or change it"
            )
        stored, axes = _read_held(holder, self.held_as), self.axes.split()
        assert stored is not None
        if self.layout == tuple((axis,) for axis in axes):
            return stored
        view = logical_view(stored, self.layout, axes, shape)
        if isinstance(stored, nn.Parameter) and stored.grad is not None:
            # A view is no leaf, and would know nothing of the gradient that the parameter has.
            view.grad = logical_view(stored.grad, self.layout, axes, shape)
        return view

    def __set__(self, part: "Part", value: object) -> None:
        shape = part.shapes.get(self.name)
        if shape is None or not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wanted = "no such weight" if shape is None else f"{self.axes.split()} {list(shape)}"
            raise ConfigError(
                f"{self.name} = {found}: this network has {wanted}; other sizes are another network (cfg.replace)"
            )
        stored = stored_view(value.detach(), self.layout, self.axes.split()).contiguous()
        holder = part if self.module is None else part._modules[self.module]
        assert holder is not None
        if isinstance(holder, Adapted):
            raise ConfigError(
                f"{self.name} = {list(value.shape)}: adapters stand beside {self.module}, and what is read under this "
                f"name is made of its weight and theirs; assign {self.module}.base_layer.{self.held_as}, or the weight "
                "in the model that model.merge_adapter() gives"
            )
        if not self.is_bias and is_quantised(holder):
            raise ConfigError(
                f"{self.name} = {list(value.shape)}: the weight of {self.module} is quantised, and would hold other "
                "numbers than these; assign it in the model that model.dequantize() gives"
            )
        # A parameter brings its own requires_grad; a tensor takes over the old one's.
        old = holder._parameters.get(self.held_as, stored)
        self.refuse_change(old, value)
        trains = value.requires_grad if isinstance(value, nn.Parameter) or old is None else old.requires_grad
        setattr(holder, self.held_as, nn.Parameter(stored, requires_grad=trains))

    def refuse_change(self, held: object, value: object) -> None:
        """Refuse to put a value in the place of a weight that is offloaded.

        Raises:
            ConfigError: it is.
        """
        if isinstance(held, OffloadedTensor):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{self.name} = {found}: {explain_change(held)}")


def _read_held(holder: nn.Module, held_as: str) -> Tensor | None:
    """A weight or bias as it is stored; made anew where it is quantised, or adapters beside it have a part in it."""
    if isinstance(holder, Adapted):
        return holder.effective_bias() if held_as == "bias" else holder.effective_weight()
    if held_as == "weight" and is_quantised(holder):
        return dense_weight(holder)
    held: Tensor | None = getattr(holder, held_as)
    return held


weight = _declare(Weight)


@dataclass
class Slot(Declared):
    """A part inside a part; the attribute is None where a network does not have it.

    Args:
        part: its class, or how the spec of the outer part says so.
        spec: what it is built from, given the spec of the outer part.
        reads: the sibling whose output its reading weights are multiplied with.
        reads_outer: these are multiplied with what the outer part reads.
        when: whether a network has it.
        per_layer: there is one in each layer, and `spec` gives one for each.
        axes: for norms, the axes of what they norm.
        where: for norms, where they stand, in words.
        stand_in: a class with the same hook points in its place, given the spec of the outer part; None: no other.
    """

    part: "type[Part] | Callable[[Spec], type[Part]]"
    spec: Callable[[Spec], Spec] = lambda spec: spec
    _: KW_ONLY
    reads: Callable[[Spec], str | None] = lambda spec: None
    reads_outer: bool = False
    when: When = ALWAYS
    per_layer: bool = False
    axes: str = ""
    where: str = ""
    stand_in: "Callable[[Spec], type[Part] | None]" = lambda spec: None

    def part_class(self, spec: Spec) -> "type[Part]":
        """The class of the part in a network."""
        if (other := self.stand_in(spec)) is not None:
            return other
        return self.part if isinstance(self.part, type) else self.part(spec)

    def build(self, spec: Spec, place: str) -> nn.Module:
        """The part, or the parts of all layers."""
        if self.per_layer:
            return nn.ModuleList(self.part_class(one)(one) for one in self.spec(spec))
        made, inside = self.part_class(spec), self.spec(spec)
        if made.place is not None:
            return made(inside)
        return made(inside, place=f"{place}.{self.name}" if place else self.name)


inner = _declare(Slot)
