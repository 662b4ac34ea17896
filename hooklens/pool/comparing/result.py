"""What a comparison gives: tables of distances, and their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import InputError
from hooklens.viz.charts import Backend, draw_heatmaps, draw_lines

if TYPE_CHECKING:
    import pandas

_SHOWN = 100
_TITLES = {
    "cosine": "cosine",
    "relative_norm": "relative norm of the difference",
    "kl": "KL of the logit lens (nats)",
    "cka": "linear CKA, debiased",
    "biased_cka": "linear CKA",
    "weight_relative_norm": "relative norm of the weights' difference",
    "weight_cosine": "cosine of the weights",
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ModelComparison(Displayed):
    """How far models are from each other, layer by layer.

    Attributes:
        frame: a line for each pair of models and hook point: `first`, `second`, `site`, `layer` (missing outside the
            blocks), the measures, and of all weights of that block together `weight_relative_norm` and
            `weight_cosine`.
        weights: a line for each pair and weight: `first`, `second`, `layer`, `weight`, `relative_norm`, `cosine`. None:
            weights were not compared.
        names: the models, in the order in which they came.
        n_prompts: prompts that were run.
        n_tokens: tokens that were compared.
    """

    frame: "pandas.DataFrame"
    weights: "pandas.DataFrame | None"
    names: tuple[str, ...]
    n_prompts: int
    n_tokens: int

    def _summary(self) -> Summary:
        shown = self.frame.head(_SHOWN).astype(object).where(self.frame.head(_SHOWN).notna(), None)
        weights = "were not compared" if self.weights is None else f"{len(self.weights):,} compared"
        return Summary(
            title=f"ModelComparison of {', '.join(self.names)}",
            facts={
                "pairs": f"{len(self._pairs()):,}, at {self.frame['site'].nunique()} hook points",
                "prompts": f"{self.n_prompts:,}, {self.n_tokens:,} tokens",
                "weights": weights,
            },
            listing=Listing(
                columns=tuple(map(str, shown.columns)),
                rows=[tuple(_cell(name, one) for name, one in line.items()) for line in shown.to_dict("records")],
                what="rows",
                n_rows=len(self.frame),
            ),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """The table `frame`, a copy of it."""
        return self.frame.copy()

    def plot(
        self, measures: Sequence[str] | None = None, *, backend: Backend = "plotly", title: str | None = None
    ) -> Any:
        """A line over layers for each pair of models, and a panel for each measure.

        Args:
            measures: columns of `frame`; None: all that have values.
            backend: the package that draws.
            title: what stands above; None: the models' names.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            InputError: a column that there is not.
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        there = [column for column in self.frame.columns if column in _TITLES]
        wanted = [one for one in there if self.frame[one].notna().any()] if measures is None else list(measures)
        if unknown := [one for one in wanted if one not in there]:
            raise InputError(f"plot: measures are {unknown}; this comparison has {there}")
        panels: dict[str, dict[str, list[float]]] = {}
        for measure in wanted:
            lines = panels.setdefault(_TITLES[measure], {})
            for first, second in self._pairs():
                own = self.frame[(self.frame["first"] == first) & (self.frame["second"] == second)]
                lines[f"{first} - {second}"] = own[measure].tolist()
        return draw_lines(self._places(), panels, backend=backend, title=self._title(title))

    def plot_weights(
        self, measure: str = "relative_norm", *, backend: Backend = "plotly", title: str | None = None
    ) -> Any:
        """A heatmap of the blocks' weights, kinds by layers, one panel for each pair of models.

        Args:
            measure: `"relative_norm"` or `"cosine"`.
            backend: the package that draws.
            title: what stands above; None: the models' names and the measure.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            InputError: weights were not compared, or another measure.
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        if self.weights is None:
            raise InputError("plot_weights: weights were not compared; compare with weights=True")
        if measure not in ("relative_norm", "cosine"):
            raise InputError(f"plot_weights: measure is {measure!r}; expected 'relative_norm' or 'cosine'")
        table = self.weights[self.weights["layer"].notna()]
        kinds = table["weight"].str.replace(r"^blocks\.\d+\.", "", regex=True)
        rows, columns = list(dict.fromkeys(kinds)), sorted(set(table["layer"]))
        values = torch.full((len(self._pairs()), len(rows), len(columns)), torch.nan, dtype=torch.float64)
        places = {pair: number for number, pair in enumerate(self._pairs())}
        for kind, (_, line) in zip(kinds, table.iterrows(), strict=True):
            at = places[line["first"], line["second"]], rows.index(kind), columns.index(line["layer"])
            values[at] = line[measure]
        return draw_heatmaps(
            values,
            ("weight", rows),
            ("layer", [str(layer) for layer in columns]),
            [f"{first} - {second}" for first, second in self._pairs()],
            backend=backend,
            title=self._title(title) if title else f"{_TITLES[f'weight_{measure}']}: {', '.join(self.names)}",
        )

    def _pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(zip(self.frame["first"], self.frame["second"], strict=True)))

    def _places(self) -> tuple[str, list[str]]:
        """The horizontal axis: layers, or hook points where they are not one for each layer."""
        sites = list(dict.fromkeys(self.frame["site"]))
        first, second = self._pairs()[0]
        own = self.frame[(self.frame["first"] == first) & (self.frame["second"] == second)]
        kinds = {site.rpartition(".")[2] for site in sites}
        if len(kinds) == 1 and own["layer"].notna().all() and own["layer"].is_unique:
            return f"layer ({kinds.pop().removeprefix('hook_')})", [str(layer) for layer in own["layer"]]
        return "hook point", sites

    def _title(self, given: str | None) -> str:
        return ", ".join(self.names) if given is None else given


def _cell(name: object, found: Any) -> str | float | None:
    if name == "layer" and found is not None:
        return str(int(found))
    return found if found is None or isinstance(found, str) else float(found)
