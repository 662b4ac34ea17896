"""Circuits of units: the entries of activations that a behaviour needs, and the scores that they are chosen by."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int, read_one_of, read_seed, require
from hooklens.display import Displayed, Listing, Summary, format_numbers, merge_layers, one_line
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.patching.results.file import TEXT, Expectation, ResultFile

if TYPE_CHECKING:
    import pandas

UnitName = tuple[str, int]
"""A hook point's name, and the number of an entry of its last axis."""

_LISTED = 100


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


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class UnitScores(Displayed):
    """The score of every unit, averaged over pairs.

    Attributes:
        scores: by hook name, `[unit]`: by how much a unit moves the metric to the clean run's side when it is not
            ablated. Above 0 it works for the behaviour, below against.
        metric: the metric's name.
        method: how units were scored.
        ablation: what stood in the place of a unit's own value.
    """

    scores: Mapping[str, Float[Tensor, " unit"]]
    metric: str
    method: str
    ablation: str

    def __len__(self) -> int:
        return sum(map(len, self.scores.values()))

    def __getitem__(self, unit: UnitName) -> float:
        name, entry = unit
        if name not in self.scores or not 0 <= entry < len(self.scores[name]):
            raise InputError(f"no unit {unit!r}; units were scored at {', '.join(self.scores)}")
        return float(self.scores[name][entry])

    def _summary(self) -> Summary:
        return Summary(
            title=f"UnitScores({len(self)} units of {len(self.scores)} hook points, {self.metric}, {self.method})",
            facts={"ablation": self.ablation},
            listing=Listing(
                columns=("hook point", "entry", "score"),
                rows=[(name, str(entry), self[name, entry]) for name, entry in self.top(_LISTED)],
                what="units",
                caption="units with the largest scores",
                n_rows=len(self),
                more="scores.top(k) has more",
            ),
        )

    def top(self, k: int, *, by: Literal["absolute", "signed"] = "absolute") -> list[UnitName]:
        """The `k` units with the largest scores, by absolute value or by those that work for the behaviour.

        Raises:
            InputError: no number of units, or an unknown order.
        """
        size = read_int(k, what="UnitScores.top: k", least=0)
        order = read_one_of(by, what="UnitScores.top: by", options=("absolute", "signed"))
        together = torch.cat(list(self.scores.values()))
        strength = together if order == "signed" else together.abs()
        chosen = strength.argsort(descending=True, stable=True)[:size].tolist()
        units = [(name, entry) for name, scores in self.scores.items() for entry in range(len(scores))]
        return [units[index] for index in chosen]

    def circuit(self, k: int, *, by: Literal["absolute", "signed"] = "absolute") -> UnitCircuit:
        """The circuit of the `k` strongest units.

        Raises:
            InputError: as `top`.
        """
        return self._circuit_of(self.top(k, by=by))

    def random_circuit(self, k: int, *, seed: int = 0) -> UnitCircuit:
        """A circuit of `k` units drawn at random, to compare those that scores choose with.

        Raises:
            InputError: no number of units, or no seed.
        """
        size = read_int(k, what="UnitScores.random_circuit: k", least=0, most=len(self))
        generator = torch.Generator().manual_seed(read_seed(seed, what="UnitScores.random_circuit: seed"))
        units = [(name, entry) for name, scores in self.scores.items() for entry in range(len(scores))]
        return self._circuit_of([units[index] for index in torch.randperm(len(units), generator=generator)[:size]])

    def _circuit_of(self, units: list[UnitName]) -> UnitCircuit:
        kept: dict[str, list[int]] = {name: [] for name in self.scores}
        for name, entry in units:
            kept[name].append(entry)
        return UnitCircuit({name: tuple(entries) for name, entries in kept.items()})

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per unit, the strongest first: hook name, entry, score."""
        rows = [(*unit, self[unit]) for unit in self.top(len(self))]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["name", "unit", "score"])
        return table

    def save(self, path: str | Path) -> None:
        """Write the scores to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        _FILE.write(path, dict(self.scores), {name: getattr(self, name) for name in _FILE.keys})

    @classmethod
    def load(cls, path: str | Path) -> "UnitScores":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        return cls(scores=tensors, **described)


_FILE = ResultFile(
    format="hooklens.patching.unit-scores-1",
    contents="scores of units",
    writer="UnitScores.save",
    keys={"metric": TEXT, "method": TEXT, "ablation": TEXT},
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    return {name: Expectation((len(tensor) if tensor.ndim else 0,)) for name, tensor in tensors.items()}
