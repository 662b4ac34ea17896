"""The erasure of a concept as a value: affine maps at hook points, as edits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Edit, SetComponents
from hooklens.optional import import_package
from hooklens.patching.results.file import LABELS, Expectation, Expected, ResultFile, is_list
from hooklens.steering.provenance import PROVENANCE, Provenance, check_fits
from hooklens.steering.vectors import When

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PointErasure(Displayed):
    """The map `x - writers^T readers (x - mean)` at one hook point; at a point with heads, one for each head.

    Attributes:
        name: the hook point.
        mean: of the tokens that it was fitted on.
        readers: what is read of a token; rows of zeros where a head needs fewer than another.
        writers: what it is moved along.
        removed: how much of the variance goes, `E |r(x) - x|^2 / E |x - E[x]|^2`.
    """

    name: str
    mean: Float[Tensor, "*heads d"]
    readers: Float[Tensor, "*heads rank d"]
    writers: Float[Tensor, "*heads rank d"]
    removed: Float[Tensor, "*heads"]

    def _summary(self) -> Summary:
        removed = self.removed.reshape(-1).tolist()
        return Summary(
            title=f"PointErasure at {self.name}",
            facts={
                "maps": f"{len(removed)}, of rank {self.readers.shape[-2]} in {self.mean.shape[-1]} dimensions",
                "of the variance removed": f"{min(removed):.1%} to {max(removed):.1%}",
            },
        )

    @property
    def layer(self) -> int | None:
        """The layer of the hook point."""
        return layer_of(self.name)

    def edits(self, *, pos: Choice = None, when: When = "all") -> list[Edit]:
        """The edits that erase; they act wherever edits do, in any dtype.

        Args:
            pos: token positions; None: all, padding included.
            when: while generating, act on the prompt, on new tokens, or on both.
        """
        if self.mean.ndim == 1:
            values = self.readers @ self.mean
            return [SetComponents(self.name, self.readers, values, writers=self.writers, pos=pos, when=when)]
        return [
            SetComponents(self.name, readers, readers @ mean, writers=writers, head=head, pos=pos, when=when)
            for head, (mean, readers, writers) in enumerate(zip(self.mean, self.readers, self.writers, strict=True))
        ]

    def erase(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Vectors without the concept, computed at least in float64 and rounded once; heads come before `d`."""
        away = x.double() - self.mean.to(x.device)
        read = torch.einsum("...d,...rd->...r", away, self.readers.to(x.device))
        moved = torch.einsum("...r,...rd->...d", read, self.writers.to(x.device))
        return (x.double() - moved).to(x.dtype)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Erasure(Displayed):
    """A concept's erasure at several hook points.

    Attributes:
        points: in the order of the computation.
        classes: the concept's values.
        sequential: each point was fitted while those before it were erased.
        provenance: what it was made from; `counts` are tokens of each class.
    """

    points: tuple[PointErasure, ...]
    classes: tuple[str | int, ...]
    sequential: bool
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[PointErasure]:
        return iter(self.points)

    @property
    def names(self) -> list[str]:
        """The hook points."""
        return [one.name for one in self.points]

    def edits(self, *, pos: Choice = None, when: When = "all") -> list[Edit]:
        """The edits of all points at once; see `PointErasure.edits`.

        Unless it was fitted with `sequential=True`, what later points see of the earlier ones' edits is not what they
        were fitted on.
        """
        return [edit for one in self.points for edit in one.edits(pos=pos, when=when)]

    def check(self, model: HookedCausalLM) -> None:
        """Refuse a model in which the maps would mean something else.

        Raises:
            TransformError: its weights were processed otherwise.
            SteeringError: it lacks a hook point, or has another width there.
        """
        check_fits(model, self.provenance, {one.name: tuple(one.mean.shape) for one in self.points})

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each map: its place, its `rank`, and `removed`, the part of the variance that goes."""
        rows = []
        for one in self.points:
            ranks = (one.readers != 0).any(-1).sum(-1).reshape(-1).tolist()
            for head, (rank, removed) in enumerate(zip(ranks, one.removed.reshape(-1).tolist(), strict=True)):
                place = {"name": one.name, "layer": one.layer, "head": head if one.mean.ndim > 1 else None}
                rows.append({**place, "rank": rank, "removed": removed, "method": self.provenance.method})
        frame: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the erasure to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {
            f"{place}.{field}": getattr(one, field) for place, one in enumerate(self.points) for field in _FIELDS
        }
        described = {
            "names": self.names,
            "classes": list(self.classes),
            "sequential": self.sequential,
            "provenance": self.provenance.to_json(),
        }
        _FILE.write(path, tensors, described)

    @classmethod
    def load(cls, path: str | Path) -> "Erasure":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no erasure.
        """
        tensors, described = _FILE.read(path, _expect)
        points = tuple(
            PointErasure(name=name, **{field: tensors[f"{place}.{field}"] for field in _FIELDS})
            for place, name in enumerate(described["names"])
        )
        return cls(
            points=points,
            classes=tuple(described["classes"]),
            sequential=described["sequential"],
            provenance=Provenance.from_json(described["provenance"]),
        )

    def _summary(self) -> Summary:
        rows = []
        for one in self.points:
            removed = one.removed.reshape(-1).tolist()
            rows.append((one.name, len(removed), one.readers.shape[-2], f"{min(removed):.1%} to {max(removed):.1%}"))
        return Summary(
            title=f"Erasure by {self.provenance.method} of {len(self.classes)} classes at {len(self)} points",
            facts={
                "classes": ", ".join(map(str, self.classes[:20])) + (", ..." if len(self.classes) > 20 else ""),
                "fitted": "one after another, each with those before it erased"
                if self.sequential
                else "each by itself",
                **self.provenance.facts(),
            },
            listing=Listing(
                columns=("hook point", "maps", "rank", "of the variance removed"),
                rows=rows,
                what="points",
            ),
        )


_FIELDS = ("mean", "readers", "writers", "removed")

_FILE = ResultFile(
    format="hooklens erasure 1",
    contents="an erasure",
    writer="Erasure.save",
    keys={
        "names": Expected(
            "a list of hook points", lambda found: bool(found) and is_list(found, lambda one: isinstance(one, str))
        ),
        "classes": LABELS,
        "sequential": Expected("true or false", lambda found: isinstance(found, bool)),
        "provenance": PROVENANCE,
    },
)


def _expect(described: dict[str, list[str]], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {}
    for place in range(len(described["names"])):
        found = tensors.get(f"{place}.mean")
        heads = () if found is None or found.ndim < 2 else (f"{place}.heads",)
        shapes = {"mean": ("d",), "readers": ("rank", "d"), "writers": ("rank", "d"), "removed": ()}
        for field, axes in shapes.items():
            named = tuple(f"{place}.{axis}" for axis in axes)
            expected[f"{place}.{field}"] = Expectation((*heads, *named), torch.float64)
    return expected
