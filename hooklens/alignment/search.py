"""The search: interchange accuracy at every layer and position, beside controls.

At each cell a basis is trained or taken from activations, and the held-out rows are run with it interchanged there. These
runs are a sweep (`hooklens.patching.sweep`) whose source of activations is the interchanged one: rows start at the
layer and the position of their cell, on the base prompt's keys and values.

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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.alignment.basis import Basis
from hooklens.alignment.counterfactuals import Counterfactuals, read_share
from hooklens.alignment.das import DasOptions, DasTraining, Dims, read_dims
from hooklens.alignment.errors import AlignmentError, AlignmentInterruptedError
from hooklens.alignment.measuring import measure_cells
from hooklens.alignment.runs import InterchangeRuns, check_data
from hooklens.alignment.site import Site
from hooklens.alignment.table import AlignmentTable, CellBases
from hooklens.arguments import read_flag, read_one_of, read_seed, reads, require, show
from hooklens.axes import find_site, get_act_name
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.optional import import_package
from hooklens.patching.runs.memory import BatchSize, read_batch_size
from hooklens.patching.runs.tally import finish_or_keep

Method = Literal["das", "boundless", "mean_differences", "probe", "principal_components", "random", "full"]
Control = Literal["random_model", "arbitrary_labels", "placebo", "full"]

METHODS = ("das", "boundless", "mean_differences", "probe", "principal_components", "random", "full")
CONTROLS = ("random_model", "arbitrary_labels", "placebo", "full")


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
    controls: Sequence[Control] = (),
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
        method: where bases come from. `"das"` and `"boundless"` train them, for all variables at once. The others are of
            one variable: the span of `"mean_differences"` between its values, a linear `"probe"`, the
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
    plan = _read_plan(model, rows, site, layers, positions, method, n_dims, options, batch_size=batch_size, seed=seed)
    asked = _read_controls(controls, plan, len(rows.variables))
    learned, test = rows.split(held_out, seed=seed)
    run = _Search(model, plan, learned, test, asked)
    n_cells = len(plan.layers) * len(plan.positions) * (1 + len(asked))

    def stopped(why: str, table: AlignmentTable) -> Exception:
        return AlignmentInterruptedError(
            f"search stopped after {run.n_done} of {n_cells} cells ({why}); they are in this error's .result, the others "
            "are NaN",
            table,
        )

    def work() -> None:
        with import_package("tqdm").tqdm(total=n_cells, desc="searching", disable=not progress) as bar:
            run.run(bar.update)

    return finish_or_keep(work, run.table, has_begun=lambda: run.n_done > 0, stopped=stopped)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search does at each cell.

    Attributes:
        site: the word.
        names: by layer, the hook point.
        layers, positions: counted from 0.
        method: where bases come from; None: they are given.
        given: bases by hook name.
        dims: by variable; None: as many as a basis has.
        options, batch_size, seed: see `search`.
    """

    site: str
    names: dict[int, str]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    method: Method | None
    given: dict[str, Basis]
    dims: dict[str, int] | None
    options: DasOptions
    batch_size: BatchSize
    seed: int


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
        real = _Part(model, plan, learned, test)
        self.parts: dict[str, _Part] = {"": real}
        for control in controls:
            if control == "random_model":
                part = _Part(_fresh(model, seed), plan, learned, test)
            elif control == "arbitrary_labels":
                part = _Part(model, plan, learned.shuffle_labels(seed=seed), test.shuffle_labels(seed=seed))
            elif control == "placebo":
                part = _Part(model, replace(plan, method="random"), learned, test, like=real)
            else:
                part = _Part(model, replace(plan, method="full"), learned, test)
            self.parts[control] = part

    @property
    def n_done(self) -> int:
        return sum(part.n_done for part in self.parts.values())

    def run(self, tell: Callable[[int], Any]) -> None:
        """All parts, layer by layer."""
        for layer in self.plan.layers:
            for part in self.parts.values():
                part.run_layer(layer, tell)

    def table(self) -> AlignmentTable:
        """What there is so far."""
        tables = {name: part.table() for name, part in self.parts.items()}
        return replace(tables.pop(""), controls=tables)


class _Part:
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
        like: "_Part | None" = None,
    ) -> None:
        self.model, self.plan, self.learned, self.test, self.like = model, plan, learned, test, like
        shape = (len(plan.layers), len(plan.positions))
        self.margins = torch.full((*shape, len(test)), torch.nan, device=model.device)
        self.training = torch.full(shape, torch.nan, dtype=torch.float64)
        self.unpatched: Tensor | None = None
        self.bases: CellBases = {}
        self.n_done = 0

    def run_layer(self, layer: int, tell: Callable[[int], Any]) -> None:
        """Fit bases at all positions of a layer, and measure them in one sweep."""
        at = self.plan.layers.index(layer)
        found: dict[int, dict[str, Basis]] = {}
        for place, position in enumerate(self.plan.positions):
            found[position], accuracy = self._fit(layer, position)
            self.training[at, place] = accuracy
            tell(1)
        name = self.plan.names[layer]
        margins, unpatched = measure_cells(
            self.model, self.test, name, found, whole=self.plan.method == "full", batch_size=self.plan.batch_size
        )
        self.margins = self.margins.to(margins.dtype)
        self.margins[at] = margins
        self.unpatched = unpatched
        self.bases |= {(layer, position): bases for position, bases in found.items() if bases}
        self.n_done += len(self.plan.positions)

    def table(self) -> AlignmentTable:
        """What there is so far."""
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
        parts = drawn.rows.to(self.model.device).split(list(sizes.values()))
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


def _fresh(model: HookedCausalLM, seed: int) -> HookedCausalLM:
    """A network of the same configuration with weights drawn anew; the global random state is left alone."""
    with torch.device("meta"):
        made = HookedCausalLM(model.cfg)
    made = made.to_empty(device=model.device).to(model.dtype)
    made.initialize(seed=seed)
    return made.eval()


def _read_plan(
    model: HookedCausalLM,
    data: Counterfactuals,
    site: object,
    layers: object,
    positions: object,
    method: object,
    n_dims: object,
    options: object,
    *,
    batch_size: BatchSize,
    seed: int,
) -> Plan:
    """What to do at each cell.

    Raises:
        AlignmentError, HookNameError: arguments that do not fit each other or the model.
    """
    word = require(site, kind=str, what="search: site", expected="a word such as 'resid_pre'", error=AlignmentError)
    n_layers, length = model.cfg.n_layers, data.base.shape[1]
    chosen = resolve_choice(
        read_choice(layers, what="search: layers", error=AlignmentError), n_layers, what="search: layers", noun="layers",
        error=AlignmentError,
    )  # fmt: skip
    places = resolve_choice(
        read_choice(positions, what="search: positions", error=AlignmentError), length, what="search: positions",
        noun="tokens", error=AlignmentError,
    )  # fmt: skip
    if not chosen or not places:
        raise AlignmentError(f"search: layers={show(layers)} and positions={show(positions)} choose no cell")
    names = {layer: get_act_name(word, layer, n_layers=n_layers) for layer in chosen}
    missing = [name for name in names.values() if name not in model.hook_points()]
    kind = find_site(names[chosen[0]])
    if missing or kind is None or kind.axes[:2] != ("batch", "pos") or len(kind.axes) != 3 or kind.discrete:
        raise AlignmentError(
            f"search: site {word!r} is at {missing or list(names.values())[:3]}, with axes {[] if kind is None else list(kind.axes)}; "
            "expected hook points that the model has, with axes [batch pos d]; train_das takes single heads, "
            "Site(name, pos, head)"
        )
    given, known = _read_method(method, names, len(data.variables), data)
    if known in ("das", "random") or n_dims is not None:
        dims = read_dims(n_dims, data.variables, boundless=False, what="search")
        if known in ("boundless", "full") or known is None:
            raise AlignmentError(
                f"search: n_dims={show(n_dims)} goes with no method={show(method)}, which says it itself"
            )
    else:
        dims = read_dims(None, data.variables, boundless=True, what="search") if known == "boundless" else None
    trained = require(
        DasOptions() if options is None else options,
        kind=DasOptions, what="search: options", expected="alignment.DasOptions", error=AlignmentError,
    )  # fmt: skip
    if options is not None and known not in ("das", "boundless"):
        raise AlignmentError(f"search: options say how to train, and method={show(method)} trains nothing")
    return Plan(
        site=word, names=names, layers=tuple(chosen), positions=tuple(places), method=known, given=given, dims=dims,
        options=trained, batch_size=batch_size, seed=seed,
    )  # fmt: skip


def _read_method(
    method: object, names: Mapping[int, str], n_variables: int, data: Counterfactuals
) -> tuple[dict[str, Basis], Method | None]:
    if isinstance(method, Mapping):
        given = dict(method)
        wrong = [name for name, basis in given.items() if not isinstance(basis, Basis)]
        absent = [name for name in names.values() if name not in given]
        if wrong or absent:
            raise AlignmentError(
                f"search: method gives no alignment.Basis for {wrong or absent}; expected one for each hook point"
            )
        known: Method | None = None
    else:
        given, known = {}, read_one_of(method, what="search: method", options=METHODS, error=AlignmentError)
    if known not in ("das", "boundless", "random") and n_variables != 1:
        raise AlignmentError(
            f"search: method={show(method)} is of one variable, and the data interchange {list(data.variables)}; make "
            "counterfactuals of each by itself"
        )
    if known in ("mean_differences", "probe") and not (data.base_values and data.source_values):
        raise AlignmentError(
            f"search: method={method!r} needs the values of the variable; Counterfactuals.of and .draw keep them"
        )
    return given, known


def _read_controls(controls: object, plan: Plan, n_variables: int) -> list[Control]:
    listed = [controls] if isinstance(controls, str) else list(require(
        controls, kind=Sequence, what="search: controls", expected=f"a list of {', '.join(CONTROLS)}", error=AlignmentError
    ))  # fmt: skip
    read: list[Control] = [
        read_one_of(one, what="search: controls", options=CONTROLS, error=AlignmentError) for one in listed
    ]
    if len(set(read)) < len(read):
        raise AlignmentError(f"search: controls {read} name one twice")
    if "full" in read and n_variables != 1:
        raise AlignmentError(
            "search: the control 'full' takes a whole vector from one source, and the data have several"
        )
    if "placebo" in read and plan.method == "full":
        raise AlignmentError(
            "search: the control 'placebo' has as many directions as the bases, and method='full' has none"
        )
    return read
