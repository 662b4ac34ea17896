"""The search: interchange accuracy at every layer and position, beside controls.

At each cell a basis is trained or taken from activations, and the held-out rows are run with it interchanged there.
These runs are a sweep (`hooklens.patching.sweep`) whose source of activations is the interchanged one: rows start at
the layer and the position of their cell, on the base prompt's keys and values.

A control answers "would something that cannot have found the variable score as high?":

- `"random_model"`: a network of the same configuration with fresh weights. DAS on it shows what training alone makes of
  a network that has learned nothing (Wu et al. 2023, arXiv 2305.08809).
- `"arbitrary_labels"`: the rows have each other's labels, in training and in the held-out rows, so that nothing but
  their frequencies can be learned (after the control tasks of Hewitt and Liang 2019, arXiv 1909.03368).
- `"placebo"`: random orthonormal directions, as many as at the cell itself.
- `"full"`: the whole vector is interchanged. Where even that fails, no directions at the cell can succeed on rows for
  which all of the source's other content is harmless; it is the usual upper bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hooklens.alignment.basis import Basis
from hooklens.alignment.causal.counterfactuals import Counterfactuals, read_share
from hooklens.alignment.das.train import DasOptions, Dims
from hooklens.alignment.errors import AlignmentError, AlignmentInterruptedError
from hooklens.alignment.runs import check_data
from hooklens.alignment.tables.cells import TableInMaking
from hooklens.alignment.tables.plan import Control, Method, Plan, read_controls, read_plan
from hooklens.alignment.tables.table import AlignmentTable
from hooklens.arguments import read_flag, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.choice import Choice
from hooklens.patching.runs.memory import BatchSize, read_batch_size
from hooklens.patching.runs.tally import finish_or_keep
from hooklens.progress import progress_bar


@reads(
    AlignmentError,
    held_out=read_share,
    batch_size=read_batch_size,
    seed=read_seed,
    progress=read_flag,
)
def search(
    model: HookedCausalLM,
    data: Counterfactuals,
    *,
    site: str = "resid_pre",
    layers: Choice = None,
    positions: Choice = None,
    method: Method | Mapping[str, Basis] = "das",
    n_dims: Dims = None,
    controls: Control | Sequence[Control] = (),
    held_out: float = 0.25,
    options: DasOptions | None = None,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    progress: bool = True,
) -> AlignmentTable:
    """Interchange accuracy at every layer and position, on rows that nothing was fitted to.

    Args:
        model: the model; it stays as it is.
        data: what the interchanges should lead to.
        site: a word for a kind of hook point with axes `[batch pos d]`, once per block: `"resid_pre"`, `"mlp_out"`, ...
        layers: layers; negative ones count from the last; None: all.
        positions: positions; negative ones count from the end; None: all.
        method: where bases come from. `"das"` and `"boundless"` train them, for all variables at once. The others are
            of one variable: the span of `"mean_differences"` between its values, a linear `"probe"`, the
            `"principal_components"` of activations, `"random"` directions, or `"full"`, the whole vector. Or bases of
            one's own by the name of the hook point, each used at all positions.
        n_dims: dimensions of each variable; None: as many as a basis has that is not trained.
        controls: `"random_model"`, `"arbitrary_labels"`, `"placebo"`, `"full"`; each gives a table beside the real one.
        held_out: the share of rows that accuracies are of.
        options: how to train.
        batch_size: rows that run at once; `"auto"`: by memory.
        seed: draws everything; the global random state is left alone.
        progress: show a progress bar.

    Raises:
        AlignmentError: arguments that do not fit each other or the model.
        HookNameError: no such kind of hook point.
        InputError: training mode, or hooks attached to the model.
        AlignmentInterruptedError: the search was stopped, or failed on the way; it holds the table so far, NaN where
            nothing was measured.

    Example:
        >>> table = alignment.search(model, data, method="das", n_dims=4, controls=["placebo", "full"])
        >>> table.plot()
    """
    rows = check_data(model, data, what="search")
    plan = read_plan(model, rows, site, layers, positions, method, n_dims, options, batch_size=batch_size, seed=seed)
    asked = read_controls(controls, plan, len(rows.variables))
    learned, test = rows.split(held_out, seed=seed)
    run = _Search(model, plan, learned, test, asked)
    n_cells = len(plan.layers) * len(plan.positions) * (1 + len(asked))

    def stopped(why: str, table: AlignmentTable) -> Exception:
        return AlignmentInterruptedError(
            f"search stopped after {run.n_done} of {n_cells} cells ({why}); they are in this error's .result, the "
            "others are NaN",
            table,
        )

    def work() -> None:
        with progress_bar("searching", total=n_cells, unit="cell", progress=progress) as bar:
            run.run(bar.update)

    return finish_or_keep(work, run.table, has_begun=lambda: run.has_begun, stopped=stopped)


class _Search:
    """A search in progress: the table, and those of its controls."""

    def __init__(
        self,
        model: HookedCausalLM,
        plan: Plan,
        learned: Counterfactuals,
        test: Counterfactuals,
        controls: Sequence[Control],
    ) -> None:
        self.plan = plan
        seed = plan.seed
        real = TableInMaking(model, plan, learned, test)
        self.parts: dict[str, TableInMaking] = {"": real}
        for control in controls:
            if control == "random_model":
                part = TableInMaking(_fresh(model, seed), plan, learned, test)
            elif control == "arbitrary_labels":
                part = TableInMaking(model, plan, learned.shuffle_labels(seed=seed), test.shuffle_labels(seed=seed))
            elif control == "placebo":
                part = TableInMaking(model, replace(plan, method="random"), learned, test, like=real)
            else:
                part = TableInMaking(model, replace(plan, method="full"), learned, test)
            self.parts[control] = part

    @property
    def n_done(self) -> int:
        return sum(part.n_done for part in self.parts.values())

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to keep."""
        return any(part.has_begun for part in self.parts.values())

    def run(self, tell: Callable[[int], Any]) -> None:
        """All parts, layer by layer."""
        for layer in self.plan.layers:
            for part in self.parts.values():
                part.run_layer(layer, tell)

    def table(self) -> AlignmentTable:
        """What there is so far."""
        tables = {name: part.table() for name, part in self.parts.items()}
        return replace(tables.pop(""), controls=tables)


def _fresh(model: HookedCausalLM, seed: int) -> HookedCausalLM:
    """A network of the same configuration with weights drawn anew; the global random state is left alone."""
    with torch.device("meta"):
        made = HookedCausalLM(model.cfg)
    made = made.to_empty(device=model.device).to(model.dtype)
    made.initialize(seed=seed)
    return made.eval()
