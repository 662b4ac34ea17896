"""Where interchanges happen: a hook point, positions, heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooklens.alignment.errors import AlignmentError
from hooklens.axes import find_site, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookNameError, suggest_names
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.hooks.edits import Edit, Interchange, Replace
from hooklens.hooks.values import TensorValue


@dataclass(frozen=True)
class Site(TensorValue):
    """A place in a network.

    Attributes:
        name: the full name of a hook point with axes `[batch pos d]` or `[batch pos head d]`.
        pos: the positions, as edits take them; None: all. The same basis is used at each.
        head: the head, at a point that has heads.

    Raises:
        AlignmentError: positions or a head that are none.
    """

    name: str
    pos: Choice = None
    head: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise AlignmentError(f"Site: name is {self.name!r}; expected the full name of a hook point")
        read_choice(self.pos, what=f"Site({self.name!r}): pos", error=AlignmentError)
        if not isinstance(read_choice(self.head, what=f"Site({self.name!r}): head", error=AlignmentError), int | None):
            raise AlignmentError(
                f"Site({self.name!r}): head is {self.head!r}; expected the number of one head, or None"
            )

    def __str__(self) -> str:
        at = [f"{word} {one}" for word, one in (("pos", self.pos), ("head", self.head)) if one is not None]
        return ", ".join([self.name, *at])


@dataclass(frozen=True)
class Place:
    """A site in one model, for prompts of one length.

    Attributes:
        site: the site.
        positions: counted from 0.
        head: counted from 0; None: the point has no heads.
        layer: the block that it lies in; None: in none.
    """

    site: Site
    positions: tuple[int, ...]
    head: int | None
    layer: int | None

    def read(self, captured: Tensor) -> Tensor:
        """The vectors there, `[row position d]`, of the whole activation."""
        chosen = captured[:, list(self.positions)]
        return chosen if self.head is None else chosen[:, :, self.head]

    def edits(
        self, bases: Mapping[str, tuple[Tensor, Tensor | None]] | None, sources: Mapping[str, Tensor]
    ) -> list[Edit]:
        """The interchanges of some variables.

        Args:
            bases: by variable, orthonormal rows and shares; None: whole vectors, of one variable.
            sources: by variable, vectors `[row position d]`.
        """
        at: dict[str, Any] = {"pos": self.positions}
        if self.head is not None:
            at["head"] = self.head
        if bases is None:
            (source,) = sources.values()
            return [Replace(self.site.name, source, **at)]
        return [
            Interchange(self.site.name, rows, sources[name], shares, **at) for name, (rows, shares) in bases.items()
        ]


def find_place(model: HookedCausalLM, site: Site | str, length: int) -> Place:
    """A site in a model.

    Raises:
        HookNameError: the model has no such hook point.
        AlignmentError: positions or heads that are not there, or a point of another shape.
    """
    site = Site(site) if isinstance(site, str) else site
    if not isinstance(site, Site):
        raise AlignmentError(f"site is {site!r}; expected alignment.Site(name, pos, head), or the name of a hook point")
    if site.name not in model.hook_points():
        raise HookNameError(
            f"the model has no hook point {site.name!r}.{suggest_names(site.name, list(model.hook_points()))}"
        )
    kind = find_site(site.name)
    axes = () if kind is None else kind.axes
    if (
        axes[:2] != ("batch", "pos")
        or len(axes) not in (3, 4)
        or (len(axes) == 4 and axes[2] not in ("head", "kv_head"))
    ):
        raise AlignmentError(f"site {site}: its axes are {list(axes)}; expected [batch pos d] or [batch pos head d]")
    positions = resolve_choice(_index(site.pos), length, what=f"site {site}: pos", noun="tokens", error=AlignmentError)
    head = None
    if len(axes) == 4:
        if site.head is None:
            raise AlignmentError(f"site {site}: its axes are {list(axes)}; choose a head, Site(name, pos, head)")
        n_heads = model.cfg.size(axes[2])
        [head] = resolve_choice(int(site.head), n_heads, what=f"site {site}: head", noun="heads", error=AlignmentError)
    elif site.head is not None:
        raise AlignmentError(f"site {site}: its axes are {list(axes)}, without heads")
    if not positions:
        raise AlignmentError(f"site {site}: no position of prompts of {length} tokens is chosen")
    return Place(site, tuple(positions), head, layer_of(site.name))


def _index(pos: Choice) -> Index:
    return read_choice(pos, what="Site: pos", error=AlignmentError)
