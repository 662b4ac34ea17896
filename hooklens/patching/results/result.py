"""The result of a sweep: labelled values, on a scale from one run to the other.

The value of a cell is the metric of the patched run. `normalized` puts 0 at the run that was patched and 1 at the
run that the activations came from: with `direction="denoise"` 1 means that the patch alone restores the clean
behaviour (the site is sufficient), with `"noise"` 1 means that it alone destroys it (the site is necessary).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.errors import CheckpointError, HookLensError
from hooklens.optional import import_package
from hooklens.patching.results.figures import Backend, LabelledAxis, draw_heatmaps

if TYPE_CHECKING:
    import pandas

_FORMAT = "hooklens.patching.result-1"


@dataclass(frozen=True, kw_only=True)
class SweepStats:
    """What a sweep took, against one full forward per cell and pair.

    Attributes:
        cells: cells of the grid.
        pairs: pairs of prompts.
        unchanged: patches that put in what was there already, so that nothing had to run.
        forwards: passes through the model, those of the unpatched runs included.
        tokens: tokens run through all layers, or as many through some as comes to the same.
        naive_forwards: one per cell and pair, and the two unpatched runs.
        naive_tokens: the tokens of those.
    """

    cells: int
    pairs: int
    unchanged: int
    forwards: int
    tokens: float
    naive_forwards: int
    naive_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class SweepResult:
    """Values of a metric on a grid of patches.

    Attributes:
        per_pair: `[*axes pair]`, the metric of every patched run; NaN where it was not run.
        axes: the axes and their labels, in order.
        clean_per_pair, corrupted_per_pair: the metric of the unpatched runs.
        cells: for each cell, in the order of the flattened axes: hook name, layer, pos, head, source.
        metric: the metric's name.
        direction: `"denoise"`: clean activations into the corrupted run; `"noise"`: the other way.
        stats: what it took.
    """

    per_pair: Float[Tensor, "*axes pair"]
    axes: dict[str, tuple[int | str, ...]]
    clean_per_pair: Float[Tensor, " pair"]
    corrupted_per_pair: Float[Tensor, " pair"]
    cells: tuple[dict[str, Any], ...]
    metric: str
    direction: Literal["denoise", "noise"]
    stats: SweepStats

    @property
    def values(self) -> Float[Tensor, "*axes"]:
        """The metric, averaged over pairs."""
        return self.per_pair.mean(-1)

    @property
    def clean(self) -> float:
        """The metric of the clean run, averaged over pairs."""
        return float(self.clean_per_pair.mean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run, averaged over pairs."""
        return float(self.corrupted_per_pair.mean())

    @property
    def normalized(self) -> Float[Tensor, "*axes"]:
        """The values with 0 at the run that was patched and 1 at the run that the activations came from.

        Raises:
            HookLensError: both runs have the same value.
        """
        start, end = (self.corrupted, self.clean) if self.direction == "denoise" else (self.clean, self.corrupted)
        if start == end:
            raise HookLensError(
                f"the clean and the corrupted run have the same {self.metric}, {start}: there is no scale between them"
            )
        return (self.values - start) / (end - start)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell: site, the axes, value, and normalized value where the two runs differ."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(list(self.cells))
        empty = [column for column in table.columns if table[column].isna().all()]
        table = table.drop(columns=empty)
        table["value"] = self.values.flatten().tolist()
        if self.clean != self.corrupted:
            table["normalized"] = self.normalized.flatten().tolist()
        return table

    def top(self, k: int = 10) -> "pandas.DataFrame":
        """The `k` cells whose value is furthest from that of the run that was patched."""
        table = self.to_dataframe()
        base = self.corrupted if self.direction == "denoise" else self.clean
        order = (table["value"] - base).abs().sort_values(ascending=False, na_position="last").index
        return table.loc[order[:k]].reset_index(drop=True)

    def plot(
        self,
        *,
        backend: Backend = "plotly",
        title: str | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """A heatmap of the normalized values, one panel per entry of the axes before the last two.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric and its scale.
            labels: by axis, what to write in place of its numbers, one for each number; `{"pos": pair.labels}`
                writes the tokens.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend, or labels that do not go with the axes.
        """
        values, rows, columns, panels = self._as_panels(self._labels(labels or {}))
        heading = self._heading() if title is None else title
        return draw_heatmaps(values, rows, columns, panels, backend=backend, title=heading)

    def _heading(self) -> str:
        if self.clean == self.corrupted:
            return self.metric
        start, end = ("corrupted", "clean") if self.direction == "denoise" else ("clean", "corrupted")
        return f"{self.metric}: 0 as in the {start} run, 1 as in the {end} run"

    def _labels(self, given: Mapping[str, Sequence[str]]) -> list[LabelledAxis]:
        """The axes with what is written at them."""
        unknown = [name for name in given if name not in self.axes]
        if unknown:
            raise HookLensError(f"plot: labels are given for {unknown}; the axes are {list(self.axes)}")
        labelled = []
        for name, numbers in self.axes.items():
            texts = [str(number) for number in numbers]
            if name in given:
                wanted = numbers if all(isinstance(number, int) for number in numbers) else range(len(numbers))
                outside = [number for number in wanted if not -len(given[name]) <= int(number) < len(given[name])]
                if outside:
                    raise HookLensError(
                        f"plot: {len(given[name])} labels for axis {name!r} have none for {outside}; give one for "
                        "each number from 0 on"
                    )
                texts = [str(given[name][int(number)]) for number in wanted]
            labelled.append((name, texts))
        return labelled

    def _as_panels(self, axes: list[LabelledAxis]) -> tuple[Tensor, LabelledAxis, LabelledAxis, list[str]]:
        """Values `[panel row column]`, the axis of rows and of columns with their labels, titles of panels."""
        same = self.clean == self.corrupted
        values = (self.values if same else self.normalized).detach().cpu().double()
        axes = [("", [""])] * (2 - len(axes)) + axes
        titles = [""]
        for name, labels in axes[:-2]:
            titles = [f"{title} {name} {label}".strip() for title in titles for label in labels]
        shape = (len(titles), len(axes[-2][1]), len(axes[-1][1]))
        return values.reshape(shape), axes[-2], axes[-1], titles

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file."""
        described = {
            "axes": [[name, list(labels)] for name, labels in self.axes.items()],
            "cells": self.cells,
            "metric": self.metric,
            "direction": self.direction,
            "stats": asdict(self.stats),
        }
        tensors = {
            "per_pair": self.per_pair.contiguous(),
            "clean": self.clean_per_pair.contiguous(),
            "corrupted": self.corrupted_per_pair.contiguous(),
        }
        save_file(tensors, path, metadata={"format": _FORMAT, "description": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> "SweepResult":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no sweep result.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} is not a saved sweep; write one with result.save(path)")
                described = json.loads(metadata["description"])
                return cls(
                    per_pair=file.get_tensor("per_pair"),
                    clean_per_pair=file.get_tensor("clean"),
                    corrupted_per_pair=file.get_tensor("corrupted"),
                    axes={name: tuple(labels) for name, labels in described["axes"]},
                    cells=tuple(described["cells"]),
                    metric=described["metric"],
                    direction=described["direction"],
                    stats=SweepStats(**described["stats"]),
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read a sweep from {path}: {error}") from error
