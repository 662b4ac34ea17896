"""One table in the making: bases at the cells of a layer, and their margins."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooklens.alignment.basis import Basis
from hooklens.alignment.causal.counterfactuals import Counterfactuals
from hooklens.alignment.das.train import DasTraining
from hooklens.alignment.runs import InterchangeRuns
from hooklens.alignment.site import Site
from hooklens.alignment.tables.measuring import measure_cells
from hooklens.alignment.tables.plan import Plan
from hooklens.alignment.tables.table import AlignmentTable, CellBases
from hooklens.causal_lm import HookedCausalLM


class TableInMaking:
    """One table in the making.

    Args:
        model: the model.
        plan: what to do.
        learned: the rows that bases are fitted to.
        test: the rows that are measured.
        like: the part whose bases say how many random directions to take.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        plan: Plan,
        learned: Counterfactuals,
        test: Counterfactuals,
        *,
        like: "TableInMaking | None" = None,
    ) -> None:
        self.model, self.plan, self.learned, self.test, self.like = model, plan, learned, test, like
        shape = (len(plan.layers), len(plan.positions))
        self.margins = torch.full((*shape, len(test)), torch.nan, device=model.device)
        self.training = torch.full(shape, torch.nan, dtype=torch.float64)
        self.unpatched: Tensor | None = None
        self.bases: CellBases = {}
        self.n_done = 0
        self._waiting: tuple[int, dict[int, dict[str, Basis]]] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is a basis to keep."""
        return self.n_done > 0 or (self._waiting is not None and bool(self._waiting[1]))

    def run_layer(self, layer: int, tell: Callable[[int], Any]) -> None:
        """Fit bases at all positions of a layer, and measure them in one sweep."""
        found: dict[int, dict[str, Basis]] = {}
        self._waiting = layer, found
        for place, position in enumerate(self.plan.positions):
            bases, accuracy = self._fit(layer, position)
            self.training[self.plan.layers.index(layer), place] = accuracy
            found[position] = bases
            tell(1)
        self._measure()

    def table(self) -> AlignmentTable:
        """What there is so far; bases of a layer that was not finished are measured now."""
        self._measure()
        empty = self.margins.new_full((len(self.test),), torch.nan)
        return AlignmentTable(
            method="given" if self.plan.method is None else self.plan.method,
            site=self.plan.site,
            variables=self.test.variables,
            layers=self.plan.layers,
            positions=self.plan.positions,
            margins=self.margins,
            unpatched_margins=empty if self.unpatched is None else self.unpatched,
            training_accuracy=self.training,
            bases=self.bases,
        )

    def _measure(self) -> None:
        """Measure the bases that wait for it; what fails here is not tried again."""
        if self._waiting is None:
            return
        (layer, found), self._waiting = self._waiting, None
        if not found:
            return
        whole = self.plan.method == "full"
        name, at = self.plan.names[layer], self.plan.layers.index(layer)
        margins, self.unpatched = measure_cells(
            self.model, self.test, name, found, whole=whole, batch_size=self.plan.batch_size
        )
        self.margins = self.margins.to(margins.dtype)
        self.margins[at, [self.plan.positions.index(position) for position in found]] = margins
        self.bases |= {(layer, position): bases for position, bases in found.items() if bases}
        self.n_done += len(found)

    def _fit(self, layer: int, position: int) -> tuple[dict[str, Basis], float]:
        """The bases of a cell, and the accuracy on the rows they were trained on (NaN where nothing was trained)."""
        plan, name = self.plan, self.plan.names[layer]
        if plan.method is None:
            return {self.test.variables[0]: plan.given[name]}, torch.nan
        if plan.method == "full":
            return {}, torch.nan
        site = Site(name, position)
        # Cells do not share their draws.
        seed = plan.seed + 7919 * layer + 104729 * position
        if plan.method in ("das", "boundless"):
            training = DasTraining(
                self.model,
                self.learned,
                site,
                plan.dims or {},
                boundless=plan.method == "boundless",
                options=plan.options,
                batch_size=plan.batch_size,
                seed=seed,
            )
            training.run(progress=False)
            bases, accuracy = training.bases()
            return bases, accuracy
        if plan.method == "random":
            return self._placebo(name, layer, position, seed), torch.nan
        return {self.test.variables[0]: self._take(site)}, torch.nan

    def _placebo(self, name: str, layer: int, position: int, seed: int) -> dict[str, Basis]:
        """Orthogonal random directions, as many as the real cell has for each variable."""
        if self.like is None:
            assert self.plan.dims is not None
            sizes = self.plan.dims
        else:
            sizes = {variable: len(basis) for variable, basis in self.like.bases[layer, position].items()}
        d = _width(self.model, name)
        drawn = Basis.random(name, sum(sizes.values()), d, seed=seed, dtype=self.model.dtype)
        parts = torch.split(drawn.rows.to(self.model.device), list(sizes.values()))
        return {
            variable: Basis(name, rows, "random", {"seed": seed}) for variable, rows in zip(sizes, parts, strict=True)
        }

    def _take(self, site: Site) -> Basis:
        """A basis of activations: of the base prompts and the sources of the variable."""
        [variable] = self.learned.variables
        base, sources = InterchangeRuns(self.model, self.learned, site, batch_size=self.plan.batch_size).vectors()
        vectors = torch.cat([base[:, 0], sources[variable][:, 0]])
        n_dims = None if self.plan.dims is None else self.plan.dims[variable]
        if self.plan.method == "principal_components":
            return Basis.of_principal_components(site.name, vectors, n_dims=n_dims)
        values = torch.cat([self.learned.base_values[variable], self.learned.source_values[variable]])
        take = Basis.of_mean_differences if self.plan.method == "mean_differences" else Basis.of_fitted_probe
        return take(site.name, vectors, values, n_dims=n_dims)


def _width(model: HookedCausalLM, name: str) -> int:
    with torch.no_grad(), model.capture(name) as captured:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), return_type=None)
    return captured[name].shape[-1]
