"""The result of a sweep: labelled values, on a scale from one run to the other.

The value of a cell is the metric of the patched run. `normalized` puts 0 at the run that was patched and 1 at the
run that the activations came from: with `direction="denoise"` 1 means that the patch alone restores the clean
behaviour (the site is sufficient), with `"noise"` 1 means that it alone destroys it (the site is necessary).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.display import Listing, Picture, Summary, format_number
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.results.file import (
    DIRECTION,
    LABELS,
    TEXT,
    Expectation,
    Expected,
    ResultFile,
    expect_numbers_of,
    is_list,
)
from hooklens.patching.results.over_pairs import Compute, Mark, OverPairs, Statistic
from hooklens.patching.results.scale import find_small_differences
from hooklens.viz.charts import CROSS, Backend, LabelledAxis, draw_heatmaps
from hooklens.viz.excerpt import strongest, thumbnail

if TYPE_CHECKING:
    import pandas


_SHOWN = 100


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
        unplanned: values that took one full forward each, since no more is known of the edits that act in them.
    """

    cells: int
    pairs: int
    unchanged: int
    forwards: int
    tokens: float
    naive_forwards: int
    naive_tokens: int
    unplanned: int = 0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SweepResult(OverPairs):
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
    def base_per_pair(self) -> Float[Tensor, " pair"]:
        """The metric of the run that was patched, without a patch."""
        return self.corrupted_per_pair if self.direction == "denoise" else self.clean_per_pair

    @property
    def source_per_pair(self) -> Float[Tensor, " pair"]:
        """The metric of the run that the activations came from."""
        return self.clean_per_pair if self.direction == "denoise" else self.corrupted_per_pair

    @property
    def normalized(self) -> Float[Tensor, "*axes"]:
        """The values with 0 at the run that was patched and 1 at the run that the activations came from.

            normalized = (mean m - mean m_patched_run) / (mean m_source_run - mean m_patched_run)

        A *ratio of means* over pairs, as the faithfulness of Wang et al. (2022, "Interpretability in the Wild"),
        whose scores are averaged before they are compared. `normalized_per_pair` has the ratio of each pair; its mean
        is another number. Under `direction="noise"` 1 is the corrupted run (Heimersheim and Nanda 2024, "How to Use
        and Interpret Activation Patching", on what denoising and noising each tell).

        Raises:
            HookLensError: both runs have the same value.
        """
        start, end = float(self.base_per_pair.mean()), float(self.source_per_pair.mean())
        if start == end:
            raise HookLensError(
                f"the clean and the corrupted run have the same {self.metric}, {start}: there is no scale between them"
            )
        return (self.values - start) / (end - start)

    @property
    def normalized_per_pair(self) -> Float[Tensor, "*axes pair"]:
        """The values of each pair with 0 at its run that was patched and 1 at the other one.

            normalized_per_pair = (m - m_patched_run) / (m_source_run - m_patched_run)

        The normalised metric of Zhang and Nanda (2023, "Towards Best Practices of Activation Patching"); its mean
        over pairs is a *mean of ratios*, in which pairs whose two runs nearly agree can outweigh all others:
        `small_differences` names them. `FractionRecovered` is this under `"denoise"`, and 1 minus this under
        `"noise"`. NaN or infinite where both runs have the same value.
        """
        start = self.base_per_pair
        return (self.per_pair - start) / (self.source_per_pair - start)

    @property
    def small_differences(self) -> dict[int, float]:
        """The pairs whose two unpatched runs differ by less than a twentieth of the root mean square over pairs.

        The values are the shares of it. A ratio of such a pair says little.
        """
        return find_small_differences(self.clean_per_pair - self.corrupted_per_pair)

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        return compute(self.per_pair, self.base_per_pair)

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per cell: site, the axes, value, and normalized value where the two runs differ.

        Args:
            statistics: what else to give of each value: `"standard_error"`; `"bootstrap"`, the ends `"low"` and
                `"high"` of its interval; `"permutation_test"`, the `"p_value"`. `bootstrap` and `permutation_test`
                take options of their own.

        Raises:
            HookLensError: an unknown statistic, or fewer than two pairs.
            MissingDependencyError: a statistic of scipy, which is not installed.
        """
        more = self._columns_of(statistics)
        table: pandas.DataFrame = import_package("pandas").DataFrame(list(self.cells))
        empty = [column for column in table.columns if table[column].isna().all()]
        table = table.drop(columns=empty)
        table["value"] = self.values.flatten().tolist()
        if self.clean != self.corrupted:
            table["normalized"] = self.normalized.flatten().tolist()
        for name, column in more.items():
            table[name] = column.flatten().tolist()
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
        mark: Mark | None = None,
    ) -> Any:
        """A heatmap of the normalized values, one panel per entry of the axes before the last two.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric and its scale.
            labels: by axis, what to write in place of its numbers, one for each number; `{"pos": pair.labels}`
                writes the tokens.
            mark: put a cross on the cells whose patch cannot be told from none: the 95 % bootstrap interval of the
                change that it makes holds 0, or the p-value of the permutation test is above 0.05.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend or mark, labels that do not go with the axes, or marks of one pair.
        """
        values, rows, columns, panels = self._as_panels(self._labels(labels or {}))
        heading = self._heading() if title is None else title
        marks = None
        if mark is not None:
            marks = self._find_unclear(mark).cpu().view(values.shape)
            heading += "" if title is not None else f"; {CROSS}: not told from no patch ({mark.replace('_', ' ')})"
        return draw_heatmaps(values, rows, columns, panels, backend=backend, title=heading, marks=marks)

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

    def _summary(self) -> Summary:
        sizes = " x ".join(f"{len(labels)} {name}" for name, labels in self.axes.items())
        n_cells, n_pairs = len(self.cells), self.per_pair.shape[-1]
        n_missing = int(self.per_pair.isnan().any(-1).sum())
        same = self.clean == self.corrupted
        return Summary(
            title=f"{type(self).__name__}: {self.metric}, {self.direction}",
            facts={
                "cells": f"{sizes or 'one cell'}, {n_pairs:,} {'pair' if n_pairs == 1 else 'pairs'}"
                + (f", {n_missing:,} not run" if n_missing else ""),
                "unpatched": f"clean {format_number(self.clean)}, corrupted {format_number(self.corrupted)}"
                + ("; there is no scale between them" if same else ""),
                **self._more_facts(),
                "took": f"{self.stats.forwards:,} forwards and {format_number(self.stats.tokens)} tokens; one by one "
                f"{self.stats.naive_forwards:,} and {self.stats.naive_tokens:,}",
            },
            listing=self._list_strongest(),
            pages=[self._draw_small] if n_cells > 1 else [],
        )

    def _more_facts(self) -> dict[str, str]:
        """What a kind of result says besides."""
        return {}

    def _list_strongest(self) -> Listing:
        """The cells whose value is furthest from that of the run that was patched."""
        places = strongest(self.values, _SHOWN, base=float(self.base_per_pair.mean()))
        named = [
            key
            for key in (self.cells[0] if self.cells else ())
            if any(self.cells[place].get(key) is not None for place in places)
        ]
        values = {"value": self.values} | ({} if self.clean == self.corrupted else {"normalized": self.normalized})
        flat = {name: found.detach().flatten()[places].tolist() for name, found in values.items()}
        rows = [
            (*(_say(self.cells[place].get(key)) for key in named), *(found[row] for found in flat.values()))
            for row, place in enumerate(places)
        ]
        return Listing(
            columns=(*named, *values),
            rows=rows,
            what="cells",
            caption="cells with the largest change",
            n_rows=len(self.cells),
        )

    def _draw_small(self) -> Picture:
        values, rows, columns, panels = self._as_panels(self._labels({}))
        return thumbnail(values, rows=rows, columns=columns, panels=panels, title=self._heading().replace("<br>", "; "))

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        RESULT_FILE.write(path, *self._parts())

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file holds: tensors, and what describes them."""
        described = {
            "axes": [[name, list(labels)] for name, labels in self.axes.items()],
            "cells": self.cells,
            "metric": self.metric,
            "direction": self.direction,
            "stats": asdict(self.stats),
        }
        return {
            "per_pair": self.per_pair,
            "clean": self.clean_per_pair,
            "corrupted": self.corrupted_per_pair,
        }, described

    @classmethod
    def load(cls, path: str | Path) -> "SweepResult":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no sweep result.
        """
        return cls(**read_fields(RESULT_FILE, path))


def _say(label: object) -> str:
    return "" if label is None else str(label)


def read_fields(file: ResultFile, path: str | Path) -> dict[str, Any]:
    """The fields of a result in a file of a kind that has all keys of `RESULT_FILE`; keys beyond these as they are.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    tensors, described = file.read(path, _expect_tensors)
    axes = {name: tuple(labels) for name, labels in described["axes"]}
    n_cells = math.prod(len(labels) for labels in axes.values())
    if len(described["cells"]) != n_cells:
        raise file.damage(path, [f"key 'cells' has {len(described['cells'])} entries, the axes have {n_cells}"])
    return {
        **described,
        "per_pair": tensors["per_pair"],
        "clean_per_pair": tensors["clean"],
        "corrupted_per_pair": tensors["corrupted"],
        "axes": axes,
        "cells": tuple(described["cells"]),
        "stats": SweepStats(**described["stats"]),
    }


def _are_axes(found: Any) -> bool:
    def is_axis(one: Any) -> bool:
        return isinstance(one, list) and len(one) == 2 and TEXT.holds(one[0]) and LABELS.holds(one[1])

    return is_list(found, is_axis) and len({name for name, _ in found}) == len(found)


RESULT_FILE = ResultFile(
    format="hooklens.patching.result-1",
    contents="a sweep",
    writer="SweepResult.save",
    keys={
        "axes": Expected("a list of [name, labels]", _are_axes),
        "cells": Expected("a list of mappings", lambda found: is_list(found, lambda cell: isinstance(cell, dict))),
        "metric": TEXT,
        "direction": DIRECTION,
        "stats": expect_numbers_of(SweepStats),
    },
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    sizes = [len(labels) for _, labels in described["axes"]]
    return {
        "clean": Expectation(("pair",)),
        "corrupted": Expectation(("pair",)),
        "per_pair": Expectation((*sizes, "pair")),
    }
