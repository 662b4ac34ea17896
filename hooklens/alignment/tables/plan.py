"""What a search does at each cell: a caller's arguments, read and checked before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hooklens.alignment.basis import Basis
from hooklens.alignment.causal.counterfactuals import Counterfactuals
from hooklens.alignment.das.train import DasOptions, read_dims
from hooklens.alignment.errors import AlignmentError
from hooklens.arguments import read_one_of, require, show
from hooklens.axes import find_site, get_act_name
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.choice import read_choice, resolve_choice
from hooklens.patching.runs.memory import BatchSize

Method = Literal["das", "boundless", "mean_differences", "probe", "principal_components", "random", "full"]
Control = Literal["random_model", "arbitrary_labels", "placebo", "full"]

METHODS = ("das", "boundless", "mean_differences", "probe", "principal_components", "random", "full")
CONTROLS = ("random_model", "arbitrary_labels", "placebo", "full")


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


def read_plan(
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
        read_choice(layers, what="search: layers", error=AlignmentError), n_layers, what="search: layers",
        noun="layers", error=AlignmentError,
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
            f"search: site {word!r} is at {missing or list(names.values())[:3]}, with axes "
            f"{[] if kind is None else list(kind.axes)}; expected hook points that the model has, with axes "
            "[batch pos d]; train_das takes single heads, Site(name, pos, head)"
        )
    given, known = _read_method(method, names, len(data.variables), data)
    dims = _read_plan_dims(n_dims, method, known, data)
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


def _read_plan_dims(
    n_dims: object, method: object, known: Method | None, data: Counterfactuals
) -> dict[str, int] | None:
    """Dimensions by variable; None: as many as a basis has.

    Raises:
        AlignmentError: a method that needs them and has none, or the other way round.
    """
    if known in ("das", "random") or n_dims is not None:
        if known in ("boundless", "full") or known is None:
            raise AlignmentError(
                f"search: n_dims={show(n_dims)} goes with no method={show(method)}, which says it itself"
            )
        return read_dims(n_dims, data.variables, boundless=False, what="search")
    return read_dims(None, data.variables, boundless=True, what="search") if known == "boundless" else None


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


def read_controls(controls: object, plan: Plan, n_variables: int) -> list[Control]:
    """The controls that a caller asked for.

    Raises:
        AlignmentError: unknown ones, or ones that do not go with the method or the data.
    """
    listed = [controls] if isinstance(controls, str) else list(require(
        controls, kind=Sequence, what="search: controls", expected=f"a list of {', '.join(CONTROLS)}",
        error=AlignmentError,
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
