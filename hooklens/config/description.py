"""What the parts of a network declare: its weights and its hook points, by name.

The parts declare themselves beside their constructors, in `hooklens.model`; everything else derives from here: shapes,
loading checks, folding, centring, the texts about activations that a model does not have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hooklens.axes import HookSite
from hooklens.config.norms import NormConfig
from hooklens.display import Displayed, Listing, Summary, format_shape, merge_layers

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig


@dataclass(frozen=True, kw_only=True)
class DeclaredWeight:
    """A weight of a network.

    Attributes:
        name: `"blocks.3.attn.W_Q"`.
        axes: its axes in the field's order.
        shape: their sizes.
        stored: how it lies in memory: the axes of the stored matrix, of which one may be several merged
            (`(("head", "d_head"), ("d_model",))` is `[heads * d_head, d_model]`).
        reads: the norm whose output its `d_model` axis is multiplied with; None where it reads no norm.
        writes: what it gives is added to the residual stream, as it is or through a norm.
        bias: the bias of this map, whether or not the network has one; None for what is no map.
        parameter: the name of the parameter that holds it, `"blocks.3.attn.q_proj.weight"`.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    stored: tuple[tuple[str, ...], ...]
    reads: str | None = None
    writes: bool = False
    bias: str | None = None
    parameter: str = ""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The sizes of the stored axes."""
        sizes = dict(zip(self.axes, self.shape, strict=True))
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.stored)


@dataclass(frozen=True, kw_only=True, repr=False)
class Description(Displayed):
    """All that the parts of a network declare.

    Attributes:
        weights: by name, in the order of the computation. A tied `unembed.W_U` is among them.
        points: what each hook point carries, by name.
        norms: the norms, by name (`"blocks.3.ln1"`).
        absent: why the network lacks what other networks have, by the name of a weight, a point or a whole part.
    """

    weights: dict[str, DeclaredWeight] = field(default_factory=dict)
    points: dict[str, HookSite] = field(default_factory=dict)
    norms: dict[str, NormConfig] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def _summary(self) -> Summary:
        told = {name: ("weight", " ".join(one.axes), format_shape(one.shape)) for name, one in self.weights.items()}
        told |= {name: ("hook point", " ".join(site.axes), "") for name, site in self.points.items()}
        norms = [name for name, _, _ in merge_layers((name, None) for name in self.norms)]
        return Summary(
            title=f"Description of {len(self.weights):,} weights and {len(self.points):,} hook points",
            facts={"norms": ", ".join(norms) or None},
            listing=Listing(
                columns=("name", "kind", "axes", "shape"),
                rows=[(name, *shown) for name, shown, _ in merge_layers(told.items())],
                what="kinds of weights and hook points",
                more="weights and points have all",
            ),
        )

    def why_absent(self, name: str) -> str | None:
        """Why the network has no weight or point of that name; None where nothing says so."""
        while name:
            if name in self.absent:
                return self.absent[name]
            name = name.rpartition(".")[0]
        return None


_describers: list[Callable[["HookedConfig"], Description]] = []


def describe_with(describer: Callable[["HookedConfig"], Description]) -> None:
    """Say who knows the parts; the network's package does, once."""
    _describers[:] = [describer]


def describe(cfg: "HookedConfig") -> Description:
    """What the parts of a config's network declare."""
    return _describers[0](cfg)
