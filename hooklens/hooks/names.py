"""Selecting hook points: by name, shorthand, glob, list of them, or predicate."""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from hooklens.axes import ALIASES, find_site, get_act_name
from hooklens.errors import HookNameError, suggest_names

_Shorthand = str | tuple[str, int] | tuple[str, int, str]
NamesFilter = None | _Shorthand | Sequence[_Shorthand] | Callable[[str], bool]

_GLOB_CHARACTERS = frozenset("*?[")


def select_names(names_filter: NamesFilter, names: Collection[str], *, n_layers: int | None = None) -> list[str]:
    """The hook names that a filter selects, in the order of `names`.

    Args:
        names_filter: None for all but the on-request points; a full name; a word such as `"resid_pre"` (that
            point in every layer); a shorthand (`"k3"`, `("pattern", 3)`); a glob (`"blocks.*.hook_z"`, `"*"` is
            everything); a list of these; or a function from a name to a bool.
        names: the names there are.
        n_layers: number of blocks, for negative layers in shorthands.

    Raises:
        HookNameError: some part of the filter selects nothing. All such parts are named, with the nearest
            names.
    """
    if names_filter is None:
        return [name for name in names if not is_on_request(name)]
    if callable(names_filter):
        chosen = [name for name in names if names_filter(name)]
        if not chosen:
            raise HookNameError(
                f"the predicate {getattr(names_filter, '__name__', names_filter)!r} is true for none of the "
                f"{len(names)} hook points; model.hook_table() lists them"
            )
        return chosen

    selected: set[str] = set()
    problems: list[str] = []
    for part in _split(names_filter):
        matches = _match(part, names, n_layers)
        selected.update(matches)
        if not matches:
            problems.append(_explain(part, names))
    if problems:
        raise HookNameError("; ".join(problems) + "; model.hook_table() lists the points this model has")
    if not selected:
        raise HookNameError("the list of hook names is empty; use None for every point, or name at least one")
    return [name for name in names if name in selected]


def is_on_request(name: str) -> bool:
    """Whether the point is left out of "cache everything"."""
    site = find_site(name)
    return site is not None and site.on_request


def _split(
    names_filter: _Shorthand | Sequence[_Shorthand],
) -> list[str | tuple[object, ...]]:
    if isinstance(names_filter, str):
        return [names_filter]
    if isinstance(names_filter, tuple) and any(isinstance(part, int) for part in names_filter):
        return [names_filter]
    parts: list[str | tuple[object, ...]] = [*names_filter]
    wrong = [part for part in parts if not isinstance(part, str | tuple)]
    if wrong:
        raise HookNameError(f"a list of hook names holds {wrong!r}; expected strings")
    return parts


def _match(part: str | tuple[object, ...], names: Collection[str], n_layers: int | None) -> list[str]:
    if isinstance(part, tuple):
        name = get_act_name(*part, n_layers=n_layers)  # type: ignore[arg-type]
        return [name] if name in names else []
    if part in names:
        return [part]
    if _GLOB_CHARACTERS & set(part):
        return [name for name in names if fnmatchcase(name, part)]
    word = "hook_" + ALIASES.get(part, part)
    every_layer = [name for name in names if name.rpartition(".")[2] == word]
    if every_layer:
        return every_layer
    try:
        name = get_act_name(part, n_layers=n_layers)
    except HookNameError:
        return []
    return [name] if name in names else []


def _explain(part: str | tuple[object, ...], names: Collection[str]) -> str:
    if isinstance(part, str) and _GLOB_CHARACTERS & set(part):
        return f"the glob {part!r} matches no hook point"
    if isinstance(part, tuple):
        return f"this model has no hook point {part!r}"
    words = {name.rpartition(".")[2].removeprefix("hook_") for name in names}
    pool = set(names) if "." in part or part.startswith("hook_") else words
    return f"no hook point is called {part!r}.{suggest_names(part, pool)}"
