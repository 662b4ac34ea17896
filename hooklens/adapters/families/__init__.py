"""The supported families: one file each, found by importing every module in this folder."""

import importlib
import pkgutil
from functools import lru_cache

from hooklens.adapters.family import Family


@lru_cache(maxsize=1)
def load_families() -> tuple[Family, ...]:
    """All families, in alphabetical order of their files."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.FAMILY for module in modules)
