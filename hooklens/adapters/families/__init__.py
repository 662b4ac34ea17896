"""The supported families: one file each, found by importing every module in this folder."""

import importlib
import pkgutil
from functools import lru_cache

from hooklens.adapters.family import Family

# A network that came from no checkpoint is written as the first family that can express it.
_COMMONEST = ("llama", "gpt_neox", "gpt2", "falcon")


@lru_cache(maxsize=1)
def load_families() -> tuple[Family, ...]:
    """All families: the commonest first, then in alphabetical order of their files."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names = [*(name for name in _COMMONEST if name in found), *(name for name in found if name not in _COMMONEST)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.FAMILY for module in modules)
