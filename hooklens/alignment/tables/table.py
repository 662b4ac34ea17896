"""Interchange accuracy by layer and position, beside controls."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.alignment.basis import Basis
from hooklens.alignment.das.result import BASES, read_bases
from hooklens.alignment.errors import AlignmentError
from hooklens.display import Listing, Picture, Summary
from hooklens.optional import import_package
from hooklens.patching.results.file import TEXT, WHOLE_NUMBER, Expectation, Expected, ResultFile, is_list
from hooklens.patching.results.over_pairs import Compute, OverPairs
from hooklens.viz.charts import Backend, draw_heatmaps
from hooklens.viz.excerpt import strongest, thumbnail

if TYPE_CHECKING:
    import pandas

CellBases = dict[tuple[int, int], Mapping[str, Basis]]
"""By layer and position, bases by variable."""

_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AlignmentTable(OverPairs):
    """Interchange accuracy at every cell, on held-out rows.

    Statistics are over rows, and compare with the model without an interchange.

    Attributes:
        method: where the bases come from.
        site: the kind of hook point.
        variables: those that are interchanged.
        layers, positions: what the axes count.
        margins: `[layer pos row]`, by how much the label's logit leads the best other one; NaN where none was measured.
        unpatched_margins: `[row]`, the same without an interchange.
        training_accuracy: `[layer pos]`, the accuracy on the rows that a basis was trained on; NaN where none was.
        bases: by layer and position, the bases of variables; none for whole vectors.
        controls: by name, the same of what cannot have found the variables.
    """

    method: str
    site: str
    variables: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    margins: Float[Tensor, "layer pos row"]
    unpatched_margins: Float[Tensor, " row"]
    training_accuracy: Float[Tensor, "layer pos"]
    bases: Mapping[tuple[int, int], Mapping[str, Basis]]
    controls: Mapping[str, "AlignmentTable"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("bases", "controls"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def _summary(self) -> Summary:
        places = strongest(self.accuracy.nan_to_num(-1.0), _SHOWN, base=-1.0)
        cells = [divmod(place, len(self.positions)) for place in places]
        tables = {"accuracy": self, **self.controls}
        accuracies = [one.accuracy for one in tables.values()]
        return Summary(
            title=f"AlignmentTable: {self.method} of {', '.join(map(repr, self.variables))} at {self.site!r}",
            facts={
                "cells": f"{len(self.layers)} layers x {len(self.positions)} positions",
                "held-out rows": f"{self.margins.shape[-1]:,}",
                "accuracy without an interchange": f"{self.unpatched_accuracy:.3f}",
            },
            listing=Listing(
                columns=("layer", "pos", *tables),
                rows=[
                    (
                        str(self.layers[at]),
                        str(self.positions[place]),
                        *(float(found[at, place]) for found in accuracies),
                    )
                    for at, place in cells
                ],
                what="cells",
                caption="cells with the largest interchange accuracy, and the controls' there",
                n_rows=self.accuracy.numel(),
            ),
            pages=[self._draw_small],
        )

    def _draw_small(self) -> Picture:
        return thumbnail(
            self.accuracy[None],
            rows=("layer", self.layers),
            columns=("pos", self.positions),
            title="interchange accuracy",
            scale="amount",
        )

    @property
    def accuracy(self) -> Float[Tensor, "layer pos"]:
        """The interchange accuracy: the share of rows whose label comes first; NaN where none was measured."""
        return (self.margins > 0).double().masked_fill(self.margins.isnan(), torch.nan).mean(-1)

    @property
    def margin(self) -> Float[Tensor, "layer pos"]:
        """The mean margin, in logits."""
        return self.margins.mean(-1)

    @property
    def unpatched_accuracy(self) -> float:
        """The share of rows whose label the model answers with anyway."""
        known = self.unpatched_margins[~self.unpatched_margins.isnan()]
        return float((known > 0).double().mean())

    @property
    def n_dims(self) -> dict[tuple[int, int], dict[str, int]]:
        """The dimensions of each variable, by layer and position."""
        return {cell: {name: len(basis) for name, basis in bases.items()} for cell, bases in self.bases.items()}

    def best(self) -> tuple[int, int]:
        """The layer and the position with the largest accuracy; of equals the one with the largest margin.

        Raises:
            AlignmentError: nothing was measured.
        """
        if bool(self.accuracy.isnan().all()):
            raise AlignmentError("AlignmentTable.best: no cell was measured")
        accuracy = self.accuracy.nan_to_num(-1.0)
        margin = self.margin.nan_to_num(-torch.inf).masked_fill(accuracy < accuracy.max(), -torch.inf)
        at, place = divmod(int(margin.argmax()), len(self.positions))
        return self.layers[at], self.positions[place]

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per table and cell: table, layer, pos, accuracy, standard_error, margin, training_accuracy, n_dims.

        `table` is the method, or the name of a control; `n_dims` adds variables' dimensions up (none: whole vectors).
        """
        rows = []
        for name, one in {self.method: self, **self.controls}.items():
            accuracy, errors = one.accuracy, one.standard_errors
            for at, layer in enumerate(one.layers):
                for place, position in enumerate(one.positions):
                    sizes = one.n_dims.get((layer, position))
                    rows.append(
                        {
                            "table": name,
                            "layer": layer,
                            "pos": position,
                            "accuracy": float(accuracy[at, place]),
                            "standard_error": float(errors[at, place]),
                            "margin": float(one.margin[at, place]),
                            "training_accuracy": float(one.training_accuracy[at, place]),
                            "n_dims": None if sizes is None else sum(sizes.values()),
                        }
                    )
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """Heatmaps of accuracy over layers and positions, the controls beside the real one on the same scale.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        tables = {self.method: self, **self.controls}
        values = torch.stack([one.accuracy.cpu() for one in tables.values()])
        heading = f"interchange accuracy of {', '.join(self.variables)} at {self.site}" if title is None else title
        rows, columns = ("layer", [str(one) for one in self.layers]), ("pos", [str(one) for one in self.positions])
        return draw_heatmaps(values, rows, columns, list(tables), backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the table and its controls to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        described = []
        for number, (name, one) in enumerate({"": self, **self.controls}.items()):
            tensors |= {f"{number}.{word}": getattr(one, word) for word in _TENSORS}
            cells = []
            for place, ((layer, position), bases) in enumerate(one.bases.items()):
                tensors |= {f"{number}.{place}.{at}": basis.rows for at, basis in enumerate(bases.values())}
                cells.append([layer, position, [[key, basis.describe()] for key, basis in bases.items()]])
            described.append({"name": name, "method": one.method, "cells": cells})
        axes = {"layers": list(self.layers), "positions": list(self.positions), "variables": list(self.variables)}
        _FILE.write(path, tensors, {"site": self.site, **axes, "tables": described})

    @classmethod
    def load(cls, path: str | Path) -> "AlignmentTable":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, described = _FILE.read(path, _expect)
        tables = {}
        for number, one in enumerate(described["tables"]):
            held: dict[str, Any] = {word: tensors[f"{number}.{word}"] for word in _TENSORS}
            tables[one["name"]] = cls(
                method=one["method"],
                site=described["site"],
                variables=tuple(described["variables"]),
                layers=tuple(described["layers"]),
                positions=tuple(described["positions"]),
                bases={
                    (layer, position): read_bases(bases, tensors, f"{number}.{place}")
                    for place, (layer, position, bases) in enumerate(one["cells"])
                },
                **held,
            )
        return replace(tables.pop(""), controls=tables)

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        hits = (self.margins > 0).double().masked_fill(self.margins.isnan(), torch.nan)
        return compute(hits, (self.unpatched_margins > 0).double())


_TENSORS = ("margins", "unpatched_margins", "training_accuracy")


def _are_tables(found: object) -> bool:
    def is_cell(one: Any) -> bool:
        return (
            isinstance(one, list)
            and len(one) == 3
            and WHOLE_NUMBER.holds(one[0])
            and WHOLE_NUMBER.holds(one[1])
            and BASES.holds(one[2])
        )

    def is_table(one: Any) -> bool:
        return (
            isinstance(one, dict)
            and one.keys() == {"name", "method", "cells"}
            and TEXT.holds(one["name"])
            and TEXT.holds(one["method"])
            and is_list(one["cells"], is_cell)
        )

    return is_list(found, is_table) and isinstance(found, list) and [one["name"] for one in found][:1] == [""]


_NUMBERS = Expected("a list of whole numbers", lambda found: is_list(found, WHOLE_NUMBER.holds))

_FILE = ResultFile(
    format="hooklens.alignment.table-1",
    contents="an alignment table",
    writer="AlignmentTable.save",
    keys={
        "site": TEXT,
        "layers": _NUMBERS,
        "positions": _NUMBERS,
        "variables": Expected("a list of texts", lambda found: is_list(found, TEXT.holds)),
        "tables": Expected("a list of tables, the first without a name", _are_tables),
    },
)


def _expect(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {}
    sizes = len(described["layers"]), len(described["positions"])
    for number, one in enumerate(described["tables"]):
        expected[f"{number}.margins"] = Expectation((*sizes, "row"))
        expected[f"{number}.unpatched_margins"] = Expectation(("row",))
        expected[f"{number}.training_accuracy"] = Expectation(sizes, torch.float64)
        for place, (_, _, bases) in enumerate(one["cells"]):
            for at in range(len(bases)):
                name = f"{number}.{place}.{at}"
                found = tensors.get(name)
                dtype = torch.float32 if found is None or not found.is_floating_point() else found.dtype
                expected[name] = Expectation((f"{name}.k", f"{name}.d"), dtype)
    return expected
