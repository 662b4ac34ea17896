"""The supported families: one file each, found by importing every module in this folder, and those of other packages.

Another package adds families through the entry point group `hooklens.families`; each entry is a `Family`:

    [project.entry-points."hooklens.families"]
    my_family = "my_package.my_family:FAMILY"
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from hooklens.adapters.family import Family
from hooklens.arguments import show
from hooklens.errors import join_names, warn_caller

PLUGINS = "hooklens.families"
# A network that came from no checkpoint is written as the first family that can express it.
_COMMONEST = ("llama", "gpt_neox", "gpt2", "falcon")


@lru_cache(maxsize=1)
def load_families() -> tuple[Family, ...]:
    """All families: the commonest first, the rest in alphabetical order of their files, then those of other packages.

    What another package calls a family and is none, or goes by names that are taken, is left out with a warning: it
    must not stand in the way of the others.
    """
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names = [*(name for name in _COMMONEST if name in found), *(name for name in found if name not in _COMMONEST)]
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    for entry in sorted(entry_points(group=PLUGINS), key=lambda entry: (entry.name, entry.value)):
        family = _load_plugin(entry, families)
        if family is not None:
            families.append(family)
    return tuple(families)


def _load_plugin(entry: EntryPoint, families: Sequence[Family]) -> Family | None:
    at = f"the family {entry.name!r} of another package ({entry.value}, entry point {PLUGINS!r})"
    try:
        family = entry.load()
    except Exception as error:
        warn_caller(f"{at} is left out: loading it failed with {type(error).__name__}: {error}")
        return None
    if not isinstance(family, Family):
        warn_caller(f"{at} is left out: it is {show(family)}; expected a hooklens.adapters.Family")
        return None
    taken = {name for other in families for name in (other.name, *_claims(other))}
    doubled = sorted(taken & {family.name, *_claims(family)})
    if doubled:
        warn_caller(f"{at} is left out: {join_names(doubled)} is supported already; give it names of its own")
        return None
    return family


def _claims(family: Family) -> set[str]:
    return {*family.model_types, *family.dialects, *family.architectures}
