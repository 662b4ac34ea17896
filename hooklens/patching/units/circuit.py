"""Circuits of units: the entries of activations that a behaviour needs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.arguments import read_int, require
from hooklens.display import Displayed, Listing, Summary, format_numbers, merge_layers, one_line
from hooklens.errors import InputError

UnitName = tuple[str, int]
"""A hook point's name, and the number of an entry of its last axis."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class UnitCircuit(Displayed):
    """Entries of activations, those that stay when all others of the same hook points are ablated.

    Attributes:
        kept: by hook name the entries, each once, in rising order; a hook point without any is ablated whole.

    Example:
        >>> UnitCircuit({"blocks.0.mlp.hook_post": [3, 17], "blocks.1.mlp.hook_post": []})
    """

    kept: Mapping[str, tuple[int, ...]]

    def __init__(self, kept: Mapping[str, Iterable[int]]) -> None:
        """The circuit of some entries.

        Args:
            kept: by hook name, in any order; repeated ones count once.

        Raises:
            InputError: no mapping from hook names to whole numbers.
        """
        given = require(kept, kind=Mapping, what="UnitCircuit: kept", expected="a mapping from hook name to entries")
        read = {}
        for name, entries in given.items():
            if not isinstance(name, str) or isinstance(entries, str) or not isinstance(entries, Iterable):
                raise InputError(
                    f"UnitCircuit: {name!r} is given {entries!r}; expected hook names and lists of entries"
                )
            read[name] = tuple(
                sorted({read_int(one, what=f"UnitCircuit: an entry of {name}", least=0) for one in entries})
            )
        if not read:
            raise InputError("UnitCircuit: no hook point is named, so nothing could be ablated")
        object.__setattr__(self, "kept", MappingProxyType(read))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitCircuit) and dict(self.kept) == dict(other.kept)

    def __hash__(self) -> int:
        return hash(tuple(self.kept.items()))

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def __iter__(self) -> Iterator[UnitName]:
        return iter((name, entry) for name, entries in self.kept.items() for entry in entries)

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, tuple) and len(unit) == 2 and unit[1] in self.kept.get(unit[0], ())

    def __repr__(self) -> str:
        parts = merge_layers((name, len(entries)) for name, entries in self.kept.items())
        return one_line(f"UnitCircuit({len(self)} units; {', '.join(f'{name}: {n}' for name, n, _ in parts)})")

    def _summary(self) -> Summary:
        return Summary(
            title=f"UnitCircuit of {len(self):,} units",
            listing=Listing(
                columns=("hook point", "kept", "entries"),
                rows=[(name, len(entries), format_numbers(entries)) for name, entries in self.kept.items()],
                what="hook points",
                more="circuit.kept has all",
            ),
        )

    def to_mask(self, name: str, width: int) -> Bool[Tensor, " unit"]:
        """Which entries of a hook point stay.

        Raises:
            InputError: entries that it has not.
        """
        outside = [entry for entry in self.kept[name] if entry >= width]
        if outside:
            raise InputError(f"UnitCircuit: {name} has {width} entries, and the circuit holds {outside[:20]}")
        mask = torch.zeros(width, dtype=torch.bool)
        mask[list(self.kept[name])] = True
        return mask
