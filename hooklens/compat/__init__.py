"""Other libraries' names on HookLens.

`hooklens.compat.transformer_lens` has the modules of TransformerLens 2.x.
"""

import pkgutil
import sys

from hooklens.compat.names import Translation, translate
from hooklens.errors import HookLensError
from hooklens.optional import import_package

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
    layer = import_package(_LAYER)
    names = [found.name for found in pkgutil.walk_packages(layer.__path__, f"{_LAYER}.")]
    # Each is one module under both names: found here, it is not run a second time, and classes are the same.
    for name in names:
        if name != f"{_LAYER}.install":
            import_package(name)
    # Some modules have several names.
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{_LAYER}.")]:
        if name != f"{_LAYER}.install":
            sys.modules[_NAME + name.removeprefix(_LAYER)] = sys.modules[name]


__all__ = ["Translation", "install_transformer_lens", "translate"]
