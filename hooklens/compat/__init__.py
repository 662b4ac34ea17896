"""Other libraries' names on HookLens.

`hooklens.compat.transformer_lens` has the modules of TransformerLens 2.x.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hooklens.errors import HookLensError

_NAME, _LAYER = "transformer_lens", "hooklens.compat.transformer_lens"


def install_transformer_lens() -> None:
    """Make `import transformer_lens` mean `hooklens.compat.transformer_lens` in this process, submodules too.

    Doing so twice is harmless.

    Raises:
        HookLensError: TransformerLens itself has been imported, and what it made would not be of this layer's classes.
    """
    known = sys.modules.get(_NAME)
    if known is not None and known is not sys.modules.get(_LAYER):
        raise HookLensError(
            f"transformer_lens has already been imported from {getattr(known, '__file__', None)}; install the layer "
            "before anything imports it (in a notebook: restart the kernel)"
        )
    if not any(isinstance(finder, _LayerFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LayerFinder())
    importlib.import_module(_NAME)


class _LayerFinder(MetaPathFinder):
    """Finds the layer's modules under the name of TransformerLens."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module of the layer that a name stands for; None for other packages."""
        if fullname != _NAME and not fullname.startswith(f"{_NAME}."):
            return None
        return ModuleSpec(fullname, _LayerLoader(_LAYER + fullname.removeprefix(_NAME)))


class _LayerLoader(Loader):
    """Gives a module of the layer, which is one module under both names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself.

        Raises:
            ModuleNotFoundError: the layer has no such module.
        """
        try:
            return importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            if error.name != self._name:
                raise
            raise ModuleNotFoundError(
                f"{spec.name}: HookLens's import layer for TransformerLens 2.x has no such module", name=spec.name
            ) from None

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it has been run."""


__all__ = ["install_transformer_lens"]
