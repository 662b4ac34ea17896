"""Parts of a network, which say themselves what they are.

A part declares its weights, its hook points and the parts inside it as class attributes. From these it builds itself,
in that order, and everything else that must know of them is derived (`hooklens.config.Description`).

A linear map is an `nn.Linear`, the module that optimisers, quantisers, LoRA and pruning know. `W_Q` and the field's
other names are views of its weight in the logical shape, and their `.grad` of its gradient: readable, editable in place
under `no_grad`, assignable. An assignment through `.data` of such a view (`attn.W_Q.data = ...`) changes the view only;
assign `attn.W_Q` itself.

A part of one's own is one class:

    class TwoExperts(Part, place="blocks.{i}.mlp", kind="two_experts"):
        W_in = weight("d_model d_mlp", "d_mlp d_model", module="in_proj", reads=True, bias="b_in")
        hook_post = point("batch pos d_mlp", "neurons of both experts")

        def forward(self, x, call): ...

and a value in the config, `mlp=PartConfig(kind="two_experts")`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from hooklens.arguments.foreign import explain_attribute
from hooklens.axes import HookSite, declare_site, find_site
from hooklens.config import DeclaredWeight, Description, HookedConfig, PartConfig
from hooklens.errors import ConfigError, InputError
from hooklens.hooks import Call, HookedModule, HookPoint
from hooklens.hooks.foreign import run_in_call, takes_call
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.declared import Declared, Point, Slot, Spec, Weight
from hooklens.model.parts.quantised import is_quantised
from hooklens.model.parts.stacked import StackedLinear
from hooklens.weights.offloaded import is_offloaded


class Part(HookedModule):
    """A module that is built from what it declares.

    Args:
        spec: what the part is built from.
        place: the name of the place, where the class does not say it.

    Attributes:
        declared: the declarations, by name, in the order in which the part is built.
        place: where such parts stand in a network.
        cfg: the network's config.
        absent: why it lacks what it declares and does not have, by name.
        shapes: logical shapes of the weights that it has.
        size_of: the size of an axis.
        can_be_replaced: whether a module of others can stand in its place, see `hooklens.hooks.foreign`.
    """

    can_be_replaced: ClassVar[bool] = True
    declared: ClassVar[dict[str, Declared]] = {}
    place: ClassVar[str | None] = None

    def __init_subclass__(cls, *, place: str | None = None, kind: str | None = None) -> None:
        """Make a class of parts known.

        Args:
            place: where such parts stand in a network (`"blocks.{i}.mlp"`), which names their hook points.
            kind: the name under which a config asks for this class at that place.
        """
        super().__init_subclass__()
        found = {
            name: value
            for one in reversed(cls.__mro__[: cls.__mro__.index(Part)])
            for name, value in vars(one).items()
            if isinstance(value, Declared)
        }
        # What a class declares anew stands in its own order, before what it takes over.
        own = {name: found[name] for name in vars(cls) if name in found}
        cls.declared = {**own, **{name: one for name, one in found.items() if name not in own}}
        cls.place = cls.place if place is None else place
        if cls.place is not None:
            declare_sites(cls, cls.place)
        if kind is not None:
            _KINDS[cls.place, kind] = cls

    def __init__(self, spec: Spec, *, place: str | None = None) -> None:
        super().__init__()
        self.cfg: HookedConfig = spec if isinstance(spec, HookedConfig) else spec.cfg
        self.size_of: Callable[[str], int] = spec.size
        reasons = {name: one.when.why_not(spec) for name, one in self.declared.items()}
        self.absent = {name: reason for name, reason in reasons.items() if reason is not None}
        present = [one for one in self.declared.values() if isinstance(one, Weight) and one.name not in self.absent]
        self.shapes = {one.name: tuple(map(spec.size, _axes_of(one, spec))) for one in present}
        self._make_weights(spec, present)
        place = (self.place or "") if place is None else place
        for name, one in self.declared.items():
            if isinstance(one, Point) and name not in self.absent:
                setattr(self, name, HookPoint(one.site(place, *_norm_words(spec)), shared=one.shared))
            elif isinstance(one, Slot) and name not in self.absent:
                setattr(self, name, one.build(spec, place))
            elif isinstance(one, Slot):
                # Where reading it costs nothing.
                self.__dict__[name] = None

    def _make_weights(self, spec: Spec, present: list[Weight]) -> None:
        biased = {one.module for one in present if one.is_bias}
        for one in present:
            if one.module is None:
                self.register_parameter(one.name, nn.Parameter(torch.empty(self.shapes[one.name])))
            elif not one.is_bias:
                sizes = [math.prod(map(spec.size, group)) for group in one.layout]
                setattr(self, one.module, self._make_holder(sizes, bias=one.module in biased))

    def _make_holder(self, sizes: list[int], *, bias: bool) -> nn.Module:
        """The module that holds a weight, uninitialised."""
        if len(sizes) == 3:
            return StackedLinear(sizes[0], sizes[2], sizes[1], bias=bias)
        out_of, into = sizes
        holder = _BlankLinear(into, out_of, bias=bias)
        object.__setattr__(holder, "__class__", nn.Linear)
        return holder

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the part: straight, where nothing has been put around it, since a module call takes longer.

        A `forward` of the part's own (`mlp.forward = lambda x: ...`) is given the call where it has a parameter `call`,
        or takes whatever it is given.
        """
        if is_bare(self.__dict__):
            return self.forward(*arguments, **keywords)
        own = self.__dict__.get("forward")
        if own is not None and not takes_call(own):
            return run_in_call(super().__call__, arguments, keywords)
        return super().__call__(*arguments, **keywords)

    def _check_place(self, name: str, module: nn.Module, before: nn.Module) -> None:
        super()._check_place(name, module, before)
        if self._is_fixed(before) and not (isinstance(module, Part) or takes_call(module.forward)):
            raise InputError(
                f"{name}: only a part of the network's own kind can stand there, or a module whose forward takes all "
                f"that such a part takes, the `call` among it; got a {type(module).__name__}. To change what it gives, "
                "put a module in the place of the hook point behind it"
            )

    def _is_placed(self, module: nn.Module, declared: nn.Module) -> bool:
        return super()._is_placed(module, declared) and not self._is_fixed(declared)

    @staticmethod
    def _is_fixed(part: nn.Module) -> bool:
        """Whether a part is called with more than a tensor."""
        return isinstance(part, Part) and not part.can_be_replaced

    @staticmethod
    def _takes_calls(module: nn.Module) -> bool:
        return isinstance(module, Part)

    def __setattr__(self, name: str, value: Any) -> None:
        declared = self.declared.get(name)
        if isinstance(declared, Weight) and declared.module is not None:
            # nn.Module would register a parameter of that name beside the view.
            declared.__set__(self, value)
        elif isinstance(declared, Weight) and is_offloaded(self._parameters.get(name)):
            declared.refuse_change(self._parameters[name], value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            missing = f"{error}{explain_attribute(name, self._has_declared)}"
            if name in self.declared:
                missing = f"{type(self).__name__} has no {name} here: {self.absent.get(name, 'it was deleted')}"
        raise AttributeError(missing)

    def _has_declared(self, name: str) -> bool:
        """Whether the part has something of a name, which for stacked weights would take computing."""
        is_here = name in self._modules or self.__dict__.get(name) is not None
        return is_here or (hasattr(type(self), name) and name not in self.absent)

    def read_weight(self, name: str) -> Any:
        """A weight as the network has it; a subclass may show something else under its name."""
        return getattr(self, name)

    def weight_table(self) -> Iterator[tuple[Weight, tuple[int, ...]]]:
        """The weights that this part has, with their logical shapes."""
        for one in self.declared.values():
            if isinstance(one, Weight) and one.name in self.shapes:
                yield one, self.shapes[one.name]

    def draw_weights(self, draw: Callable[[Weight, tuple[int, ...]], Tensor]) -> None:
        """Make the weights anew: biases 0, the others as drawn, but for what starts from a value of its own.

        A part may have its own way.
        """
        for one, shape in self.weight_table():
            value = 0.0 if one.is_bias and one.fresh is None else one.fresh
            self.read_weight(one.name).copy_(
                draw(one, shape) if value is None else torch.full(shape, value, device="cpu")
            )


def read_weight(module: nn.Module | None, name: str) -> Any:
    """A weight of a part, or of a module of others in its place, which calls it so.

    Raises:
        AttributeError: it has no weight of that name, or there is no part.
    """
    return module.read_weight(name) if isinstance(module, Part) else getattr(module, name)


class _BlankLinear(nn.Linear):
    """A linear map whose weights nobody has drawn yet; its class is changed to `nn.Linear` once it is made."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


_KINDS: dict[tuple[str | None, str], type[Part]] = {}


def find_part(place: str, part: PartConfig) -> type[Part]:
    """The class of parts that a config asks for.

    Raises:
        ConfigError: no such kind is known.
    """
    found = _KINDS.get((place, part.kind))
    if found is None:
        known = [kind for at, kind in _KINDS if at == place]
        raise ConfigError(
            f"config: no part of the kind {part.kind!r} stands at {place!r}; known are {known}. Import the module that "
            "defines it first"
        )
    return found


def _norm_words(spec: Spec) -> tuple[str, str]:
    """The axes and the place of a norm, in words; empty for other parts."""
    return getattr(spec, "axes", ""), getattr(spec, "where", "")


def declare_sites(part: type[Part], path: str, norm_axes: str = "", where: str = "") -> None:
    """Add a part's hook points to the glossary, and those of the norms inside it."""
    for name, one in part.declared.items():
        if isinstance(one, Point):
            declare_site(one.site(path, norm_axes, where))
        elif isinstance(one, Slot) and one.axes and isinstance(one.part, type):
            declare_sites(one.part, f"{path}.{name}" if path else name, one.axes, one.where)


def describe_parts(root: type[Part], cfg: HookedConfig) -> Description:
    """What the parts of a network declare, from the outermost on."""
    description = Description()
    _describe(description, root, cfg, "", None)
    return description


def _describe(description: Description, part: type[Part], spec: Spec, prefix: str, reads: str | None) -> None:
    """Note what a part declares, and what is inside it, under full names."""
    for own_name, one in part.declared.items():
        name = prefix + own_name
        if (reason := one.when.why_not(spec)) is not None:
            description.absent[name] = reason
        elif isinstance(one, Weight):
            description.weights[name] = _describe_weight(one, spec, prefix, reads)
        elif isinstance(one, Point):
            description.points[name] = _describe_point(one, name)
        elif isinstance(one, Slot) and one.per_layer:
            for layer, inside in enumerate(one.spec(spec)):
                _describe(description, one.part_class(inside), inside, f"{name}.{layer}.", None)
        elif isinstance(one, Slot):
            sibling = one.reads(spec)
            reads_from = reads if one.reads_outer else None if sibling is None else prefix + sibling
            inside = one.spec(spec)
            if one.axes:
                description.norms[name] = inside.norm
            _describe(description, one.part_class(spec), inside, f"{name}.", reads_from)


def _describe_point(one: Point, name: str) -> HookSite:
    """What a point carries in this network; values may have a width of their own in it."""
    site = find_site(name)
    assert site is not None
    axes = tuple(one.axes.split())
    return site if "..." in axes or axes == site.axes else replace(site, axes=axes)


def _axes_of(one: Weight, spec: Spec) -> tuple[str, ...]:
    """The axes of a weight; "..." stands for those that a norm has weights for."""
    weighted: tuple[str, ...] = getattr(spec, "weighted_axes", ())
    return tuple(axis for word in one.axes.split() for axis in (weighted if word == "..." else (word,)))


def _describe_weight(one: Weight, spec: Spec, prefix: str, reads: str | None) -> DeclaredWeight:
    axes = _axes_of(one, spec)
    return DeclaredWeight(
        name=prefix + one.name,
        axes=axes,
        shape=tuple(map(spec.size, axes)),
        stored=one.layout if one.stored is not None else tuple((axis,) for axis in axes),
        reads=reads if one.reads else None,
        writes=one.writes,
        bias=None if one.bias is None else prefix + one.bias,
        parameter=f"{prefix}{'' if one.module is None else one.module + '.'}{one.held_as}",
    )


def is_bare(state: dict[str, Any]) -> bool:
    """Whether calling a module is calling its `forward`: nothing hooked on it or put around it.

    Args:
        state: the module's `__dict__`.
    """
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_plain(linear: nn.Module | None) -> bool:
    """Whether a linear map is nothing but its plain weight and bias: nothing hooked on, put around or in its place."""
    return type(linear) is nn.Linear and is_bare(linear.__dict__) and not is_quantised(linear)


def apply_linear(
    linear: nn.Module | None, x: Float[Tensor, "*axes into"], call: Call | None = None
) -> Float[Tensor, "*axes out_of"]:
    """`x W^T + b`, by the weight itself where nothing has been put around the module: a module call takes longer.

    Args:
        linear: the map.
        x: its input.
        call: who listens to what adapters beside the map add; None: nobody.
    """
    assert linear is not None
    if type(linear) is nn.Linear and is_bare(linear.__dict__):
        parameters = linear.__dict__["_parameters"]
        return F.linear(x, parameters["weight"], parameters["bias"])
    out: Tensor = linear(x, call) if isinstance(linear, Adapted) else linear(x)
    return out
