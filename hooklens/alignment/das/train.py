"""Distributed alignment search: training the directions in which a model keeps the variables of a causal model.

For a base prompt `b` and sources `s_v` the model runs `b` with

    x + sum over v of (x_v - x) B_v^T B_v

at the site, where `x_v` is the site's activation on `s_v`; `B` is trained so that it gives the causal model's answer
with the variables set from the sources (Geiger et al. 2023, arXiv 2303.02536; boundless: Wu et al. 2023, arXiv
2305.08809). The model's own weights are not trained and get no gradients.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.alignment.basis import Basis, Plain
from hooklens.alignment.causal.counterfactuals import Counterfactuals, read_share
from hooklens.alignment.das.result import DasResult, Step
from hooklens.alignment.das.rotation import Rotation
from hooklens.alignment.errors import AlignmentError, AlignmentInterruptedError
from hooklens.alignment.runs import InterchangeRuns, check_data
from hooklens.alignment.site import Site
from hooklens.arguments import read_flag, read_int, read_number, read_seed, reads, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.runs.memory import BatchSize, read_batch_size
from hooklens.patching.runs.tally import finish_or_keep
from hooklens.precision import widen
from hooklens.progress import progress_bar

Dims = int | Mapping[str, int] | None

_positive = partial(read_number, expected="a number above 0", allows=lambda number: number > 0, error=AlignmentError)
_at_least_1 = partial(read_int, least=1, error=AlignmentError)


@dataclass(frozen=True, kw_only=True)
class DasOptions:
    """How directions are trained.

    Attributes:
        steps: the most steps of Adam.
        rows_per_step: rows that a step's gradient is the mean over; they run in smaller batches where memory asks for
            it.
        lr: the learning rate of the rotation, which falls along a half cosine to 0.
        boundary_lr: that of boundless boundaries.
        temperatures: boundless: the first and the last temperature, in rows, between which it falls geometrically.
            None: from an eightieth of the rows (50 of 4096, as in the paper), but at least 1, to 0.1.
        width_penalty: boundless: what the share of all directions that variables take costs, in nats.
        validation: the share of the training rows that say when to stop.
        check_every: steps between looks at the validation rows.
        patience: looks without a lower loss there after which training stops; the rotation of the best look is kept.
            Boundless training goes on to the last step, since shares are settled only there.

    Raises:
        AlignmentError: an option that is none; all are named.
    """

    steps: int = 400
    rows_per_step: int = 64
    lr: float = 0.02
    boundary_lr: float = 0.02
    temperatures: tuple[float, float] | None = None
    width_penalty: float = 1.0
    validation: float = 0.2
    check_every: int = 20
    patience: int = 5

    def __post_init__(self) -> None:
        problems = []
        readers: dict[str, Callable[..., Any]] = {
            "steps": _at_least_1, "rows_per_step": _at_least_1, "check_every": _at_least_1, "patience": _at_least_1,
            "lr": _positive, "boundary_lr": _positive,
            "width_penalty": partial(read_number, expected="a number >= 0", allows=lambda number: number >= 0),
            "validation": read_share,
        }  # fmt: skip
        for name, reader in readers.items():
            try:
                reader(getattr(self, name), what=f"DasOptions: {name}", error=AlignmentError)
            except AlignmentError as problem:
                problems.append(str(problem))
        given: Any = self.temperatures
        if given is not None and not (
            isinstance(given, tuple) and len(given) == 2 and all(_is_positive(one) for one in given)
        ):
            problems.append(f"DasOptions: temperatures is {show(given)}, expected two numbers above 0, or None")
        if problems:
            raise AlignmentError("; ".join(problems))


def _is_positive(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < float("inf")


@reads(
    AlignmentError,
    boundless=read_flag,
    held_out=read_share,
    batch_size=read_batch_size,
    seed=read_seed,
    progress=read_flag,
)
def train_das(
    model: HookedCausalLM,
    data: Counterfactuals,
    site: Site | str,
    *,
    n_dims: Dims = None,
    boundless: bool = False,
    held_out: float = 0.25,
    options: DasOptions | None = None,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    progress: bool = True,
) -> DasResult:
    """Train the directions at a site in which the model keeps the variables of some counterfactuals.

    Args:
        model: the model; it stays as it is.
        data: what the interchanges should lead to. Its variables get orthogonal parts of one rotation.
        site: where; its positions share one rotation.
        n_dims: dimensions of each variable, one number or by variable.
        boundless: train how many dimensions each variable gets.
        held_out: the share of rows that are kept out of training, which the result's accuracy is of.
        options: how to train.
        batch_size: rows that run at once; `"auto"`: by memory.
        seed: draws the split, the first rotation and the order of rows; the global random state is left alone.
        progress: show a progress bar.

    Raises:
        AlignmentError: arguments that do not fit each other or the model.
        HookNameError: the model has no such hook point.
        InputError: training mode, or hooks attached to the model.
        AlignmentInterruptedError: training was stopped, or failed on the way; it holds the result of the best look.

    Example:
        >>> data = alignment.Counterfactuals.draw(causal_model, prompts, 1000, variables=["carry"])
        >>> site = alignment.Site("blocks.3.hook_resid_pre", pos=-1)
        >>> alignment.train_das(model, data, site, n_dims=4).accuracy
    """
    rows = check_data(model, data, what="train_das")
    given = require(
        DasOptions() if options is None else options,
        kind=DasOptions, what="train_das: options", expected="alignment.DasOptions", error=AlignmentError,
    )  # fmt: skip
    dims = read_dims(n_dims, rows.variables, boundless=boundless, what="train_das")
    learned, test = rows.split(held_out, seed=seed)
    training = DasTraining(
        model, learned, site, dims, boundless=boundless, options=given, batch_size=batch_size, seed=seed
    )

    def result() -> DasResult:
        return training.result(InterchangeRuns(model, test, site, batch_size=batch_size))

    def stopped(why: str, partial_result: DasResult) -> Exception:
        return AlignmentInterruptedError(
            f"train_das stopped after {training.n_steps} of {given.steps} steps ({why}); the best directions by then "
            "are in this error's .result",
            partial_result,
        )

    return finish_or_keep(
        partial(training.run, progress=progress), result, has_begun=lambda: training.n_steps > 0, stopped=stopped
    )


def read_dims(given: object, variables: tuple[str, ...], *, boundless: bool, what: str) -> dict[str, int]:
    """Dimensions by variable.

    Raises:
        AlignmentError: no numbers, or not those of the variables.
    """
    if boundless:
        if given is not None:
            raise AlignmentError(f"{what}: n_dims={show(given)} and boundless=True, which trains it; give one of them")
        return dict.fromkeys(variables, 1)
    if given is None:
        raise AlignmentError(f"{what}: n_dims is missing; give the dimensions of a variable, or boundless=True")
    dims = dict(given) if isinstance(given, Mapping) else dict.fromkeys(variables, given)
    if sorted(dims) != sorted(variables):
        raise AlignmentError(f"{what}: n_dims are of {sorted(dims)}, and the variables are {sorted(variables)}")
    return {name: _at_least_1(dims[name], what=f"{what}: n_dims of {name!r}") for name in variables}


class DasTraining:
    """A rotation in training.

    Args:
        model: the model.
        data: the rows to train on, those for validation included.
        site: where.
        dims: dimensions by variable.
        boundless: train them.
        options: how.
        batch_size: rows that run at once.
        seed: draws everything.

    Attributes:
        n_steps: steps done.
        stopped: why training ended.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        data: Counterfactuals,
        site: Site | str,
        dims: Mapping[str, int],
        *,
        boundless: bool,
        options: DasOptions,
        batch_size: BatchSize = "auto",
        seed: int = 0,
    ) -> None:
        self.options, self.seed = options, seed
        self.generator = torch.Generator().manual_seed(seed)
        training, validation = data.split(options.validation, seed=seed)
        self.runs = InterchangeRuns(model, training, site, batch_size=batch_size)
        self.validation = InterchangeRuns(model, validation, site, batch_size=batch_size)
        d = self.runs.batch([0]).sources[data.variables[0]].shape[-1]
        least = len(dims) if boundless else sum(dims.values())
        if least > d:
            raise AlignmentError(f"n_dims are {dict(dims)}, {least} in all, at {site}, whose vectors have {d} entries")
        self.rotation = Rotation(
            d, dims, boundless=boundless, generator=self.generator, dtype=model.dtype, device=model.device
        )
        self.n_steps, self.stopped = 0, "not begun"
        self.history: list[Step] = []
        self._best: dict[str, Tensor] = {}
        self._order: list[int] = []

    def run(self, *, progress: bool) -> None:
        """Train until the last step, or until the validation loss has not fallen for a while."""
        options = self.options
        optimizer = self._optimizer()
        looks_since = 0
        self.stopped = "interrupted"
        with progress_bar("training directions", total=options.steps, progress=progress) as bar:
            for step in range(options.steps):
                self._anneal(step, optimizer)
                loss = self._step(optimizer)
                self.n_steps = step + 1
                bar.update()
                if (step + 1) % options.check_every and step + 1 < options.steps:
                    continue
                if self._look(loss):
                    looks_since = 0
                else:
                    looks_since += 1
                bar.set_postfix(loss=loss, accuracy=self.history[-1].validation_accuracy, refresh=False)
                if looks_since >= options.patience and not self.rotation.boundless:
                    self.stopped = "no lower validation loss"
                    return
        self.stopped = "all steps done"

    def bases(self) -> tuple[dict[str, Basis], float]:
        """The best directions so far by variable, and their interchange accuracy on the rows trained on."""
        if self._best:
            self.rotation.load_state_dict(self._best)
        rows = self.rotation.hard_bases()
        origin = "boundless das" if self.rotation.boundless else "das"
        details: dict[str, Plain] = {"seed": self.seed, "steps": self.n_steps, "stopped": self.stopped}
        name = self.runs.place.site.name
        accuracy = float((self.runs.margins(_plain(rows)) > 0).double().mean())
        return {one: Basis(name, part, origin, {**details, "variable": one}) for one, part in rows.items()}, accuracy

    def result(self, held_out: InterchangeRuns) -> DasResult:
        """The best directions so far, measured on rows that were not trained on."""
        bases, accuracy = self.bases()
        place = self.runs.place
        return DasResult(
            site=Site(place.site.name, place.positions, place.head),
            bases=bases,
            margins=held_out.margins(_plain({one: basis.rows for one, basis in bases.items()})),
            unpatched_margins=held_out.margins({}),
            training_accuracy=accuracy,
            history=tuple(self.history),
            stopped=self.stopped,
        )

    def _optimizer(self) -> torch.optim.Adam:
        groups: list[dict[str, Any]] = [{"params": list(self.rotation.rows.parameters()), "lr": self.options.lr}]
        if self.rotation.widths is not None:
            groups.append({"params": [self.rotation.widths], "lr": self.options.boundary_lr})
        for group in groups:
            group["first_lr"] = group["lr"]
        return torch.optim.Adam(groups)

    def _anneal(self, step: int, optimizer: torch.optim.Adam) -> None:
        share = step / max(1, self.options.steps - 1)
        first, last = self.options.temperatures or (max(1.0, self.rotation.d / 80), 0.1)
        self.rotation.temperature = first * (last / first) ** share
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * (1 + torch.cos(torch.tensor(torch.pi * share)).item()) / 2

    def _step(self, optimizer: torch.optim.Adam) -> float:
        """One step over some rows, in batches; gives the mean cross-entropy."""
        rows = self._next_rows()
        parameters = list(self.rotation.parameters())
        for one in parameters:
            one.grad = torch.zeros_like(one)
        total, size = 0.0, self.runs.rows_per_graded_pass
        with torch.enable_grad():
            for first in range(0, len(rows), size):
                loss = self._losses(self.runs, rows[first : first + size]).sum() / len(rows)
                total += float(loss.detach())
                _add_gradients(loss, parameters)
            penalty = self.rotation.width_penalty()
            if isinstance(penalty, Tensor):
                _add_gradients(self.options.width_penalty * penalty, parameters)
        optimizer.step()
        return total

    def _losses(self, runs: InterchangeRuns, rows: list[int]) -> Float[Tensor, " row"]:
        batch = runs.batch(rows)
        return _cross_entropy(runs.logits(batch, self.rotation.bases()), batch.labels)

    def _next_rows(self) -> list[int]:
        """The next rows of an order that is drawn anew when all have been seen."""
        while len(self._order) < min(self.options.rows_per_step, len(self.runs.data)):
            self._order += torch.randperm(len(self.runs.data), generator=self.generator).tolist()
        taken, self._order = self._order[: self.options.rows_per_step], self._order[self.options.rows_per_step :]
        return taken

    def _look(self, loss: float) -> bool:
        """Measure the validation rows; whether they have their lowest loss, whose rotation is kept."""
        with torch.no_grad():
            losses, hits = [], []
            for rows in self.validation.groups(range(len(self.validation.data))):
                batch = self.validation.batch(rows)
                logits = self.validation.logits(batch, self.rotation.bases())
                losses.append(_cross_entropy(logits, batch.labels))
                hits.append(logits.argmax(-1) == batch.labels)
        found = Step(
            step=self.n_steps,
            loss=loss,
            validation_loss=float(torch.cat(losses).double().mean()),
            validation_accuracy=float(torch.cat(hits).double().mean()),
        )
        # Boundless shares are settled only at the last temperature, so the last look is the one that counts.
        is_best = self.rotation.boundless or all(found.validation_loss < one.validation_loss for one in self.history)
        self.history.append(found)
        if is_best:
            self._best = copy.deepcopy(self.rotation.state_dict())
        return is_best


def _plain(rows: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Bases whose directions are exchanged whole."""
    return {name: (part, None) for name, part in rows.items()}


def _cross_entropy(logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    return torch.nn.functional.cross_entropy(widen(logits), labels, reduction="none")


def _add_gradients(cost: Tensor, parameters: list[nn.Parameter]) -> None:
    """Add the gradients at these parameters alone: none is made or kept for the model's."""
    for one, gradient in zip(parameters, torch.autograd.grad(cost, parameters, allow_unused=True), strict=True):
        if gradient is not None and one.grad is not None:
            one.grad += gradient
