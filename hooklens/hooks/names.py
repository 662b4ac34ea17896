"""Selecting hook points: by name, shorthand, glob, list of them, or predicate."""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from hooklens.arguments import is_function, show
from hooklens.axes import ALIASES, find_site, get_act_name
from hooklens.errors import HookNameError, join_names, suggest_names

_Shorthand = str | tuple[str, int] | tuple[str, int, str]
NamesFilter = None | _Shorthand | Sequence[_Shorthand] | Callable[[str], bool]

_Part = str | tuple[object, ...] | Callable[[str], bool]

_GLOB_CHARACTERS = frozenset("*?[")


def select_names(
    names_filter: NamesFilter,
    names: Collection[str],
    *,
    n_layers: int | None = None,
    idle: Collection[str] = frozenset(),
) -> list[str]:
    """The hook names that a filter selects, in the order of `names`.

    Args:
        names_filter: None for all but the on-request points; a full name; a word such as `"resid_pre"` (that
            point in every layer); a shorthand (`"k3"`, `("pattern", 3)`); a glob (`"blocks.*.hook_z"`, `"*"` is
            every activation); a list of these; or a function from a name to a bool. `hook_tokens`, which carries ids,
            is selected by its name, or by a function that is true for nothing else.
        names: the names there are.
        n_layers: number of blocks, for negative layers in shorthands.
        idle: those of the names whose points do not fire in the call to come. What selects several names passes over
            them.

    Raises:
        HookNameError: some part of the filter selects nothing, or idle points alone. All such parts are named, with
            the nearest names.
    """
    if names_filter is None:
        return [name for name in names if not (is_on_request(name) or name in idle)]
    selected: set[str] = set()
    problems: list[str] = []
    for part in _split(names_filter):
        if callable(part):
            true = [name for name in names if _is_chosen(part, name)]
            matches = [name for name in true if not is_by_name_only(name)] or true
        else:
            matches = _match(part, names, n_layers)
        running = [name for name in matches if name not in idle]
        selected.update(running)
        if not matches:
            problems.append(_explain(part, names))
        elif not running:
            problems.append(_explain_idle(part, matches))
    if problems:
        raise HookNameError("; ".join(problems) + "; model.hook_table() lists the points this model has")
    if not selected:
        raise HookNameError("the list of hook names is empty; use None for every point, or name at least one")
    return [name for name in names if name in selected]


def is_on_request(name: str) -> bool:
    """Whether the point is left out of "cache everything"."""
    site = find_site(name)
    return site is not None and site.on_request


def is_by_name_only(name: str) -> bool:
    """Whether nothing but its name selects the point: it carries ids, and is there on request."""
    site = find_site(name)
    return site is not None and site.discrete and site.on_request


def _split(names_filter: Any) -> Sequence[_Part]:
    """The single names, globs, shorthands and predicates of a filter.

    Raises:
        HookNameError: it is none, or holds something else.
    """
    if isinstance(names_filter, str) or is_function(names_filter):
        return [names_filter]
    if isinstance(names_filter, tuple) and any(isinstance(part, int) for part in names_filter):
        return [_read_shorthand(names_filter)]
    if isinstance(names_filter, bytes | bytearray):
        raise _refuse_filter(names_filter)
    try:
        parts: list[str | tuple[object, ...]] = [*names_filter]
    except TypeError:
        raise _refuse_filter(names_filter) from None
    wrong = [part for part in parts if not isinstance(part, str | tuple)]
    if wrong:
        raise HookNameError(f"a list of hook names holds {show(wrong)}; expected strings")
    return [part if isinstance(part, str) else _read_shorthand(part) for part in parts]


def _read_shorthand(part: tuple[object, ...]) -> tuple[object, ...]:
    is_layer = len(part) > 1 and isinstance(part[1], int) and not isinstance(part[1], bool)
    if len(part) not in (2, 3) or not is_layer or not all(isinstance(word, str) for word in (*part[:1], *part[2:])):
        raise HookNameError(f"{show(part)} is no hook point; expected (name, layer) or (name, layer, module)")
    return part


def _is_chosen(predicate: Callable[[str], bool], name: str) -> bool:
    answer = predicate(name)
    try:
        return bool(answer)
    except (RuntimeError, ValueError, TypeError):
        raise HookNameError(f"the predicate answered {show(answer)} for {name!r}; expected True or False") from None


def _refuse_filter(given: object) -> HookNameError:
    return HookNameError(
        f"hook points are chosen by {show(given)}; expected a name, a glob ('*' is everything), a list of them, or a "
        "predicate(name)"
    )


def _match(part: str | tuple[object, ...], names: Collection[str], n_layers: int | None) -> list[str]:
    if isinstance(part, tuple):
        name = get_act_name(*part, n_layers=n_layers)  # type: ignore[arg-type]
        return [name] if name in names else []
    if part in names:
        return [part]
    if _GLOB_CHARACTERS & set(part):
        return [name for name in names if fnmatchcase(name, part) and not is_by_name_only(name)]
    word = "hook_" + ALIASES.get(part, part)
    every_layer = [name for name in names if name.rpartition(".")[2] == word]
    if every_layer:
        return every_layer
    try:
        name = get_act_name(part, n_layers=n_layers)
    except HookNameError:
        return []
    return [name] if name in names else []


def _explain(part: _Part, names: Collection[str]) -> str:
    if callable(part):
        name = getattr(part, "__name__", part)
        return f"the predicate {name!r} is true for none of the {len(names)} hook points"
    if isinstance(part, str) and _GLOB_CHARACTERS & set(part):
        return f"the glob {part!r} matches no hook point"
    if isinstance(part, tuple):
        return f"this model has no hook point {part!r}"
    words = {name.rpartition(".")[2].removeprefix("hook_") for name in names}
    pool = set(names) if "." in part or part.startswith("hook_") else words
    return f"no hook point is called {part!r}.{suggest_names(part, pool)}"


def _explain_idle(part: object, matches: Sequence[str]) -> str:
    return (
        f"{part!r} names {join_names(matches, limit=3)}, which this call does not reach: start_at_layer and "
        "stop_at_layer leave parts of the model out"
    )
