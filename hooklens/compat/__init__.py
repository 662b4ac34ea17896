"""Other libraries' names on HookLens.

`hooklens.compat.transformer_lens` has the modules of TransformerLens 2.x.
"""

import importlib
import pkgutil
import sys

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
    layer = importlib.import_module(_LAYER)
    for found in pkgutil.walk_packages(layer.__path__, f"{_LAYER}."):
        if found.name != f"{_LAYER}.install":
            importlib.import_module(found.name)
    # Each is one module under both names: found here, it is not run a second time, and classes are the same.
    for name, module in list(sys.modules.items()):
        if name == _LAYER or name.startswith(f"{_LAYER}."):
            sys.modules[_NAME + name.removeprefix(_LAYER)] = module


__all__ = ["install_transformer_lens"]
