"""The one door to packages that are heavy to import or installed only as extras."""

import importlib
from types import ModuleType

from hooklens.errors import MissingDependencyError

# Package -> the extra of HookLens that installs it; packages not listed come with HookLens itself.
_EXTRA_OF = {
    "matplotlib": "plot",
    "plotly": "plot",
    "peft": "peft",
    "scipy": "stats",
    "sklearn": "probes",
    "datasets": "datasets",
    "torchao": "quant",
    "bitsandbytes": "quant",
    "accelerate": "placement",
    "omegaconf": "pool",
    "lm_eval": "harness",
    "ray": "ray",
    "transformer_lens": "bench",
}


def import_package(name: str) -> ModuleType:
    """Import a package (or a submodule, `"transformers.generation"`) at the moment it is needed.

    Raises:
        MissingDependencyError: the package is not installed; the text says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        extra = _EXTRA_OF.get(root)
        install = f"pip install 'hooklens[{extra}]'" if extra else f"pip install {root}"
        raise MissingDependencyError(
            f"the package {root!r} is needed here and is not installed; install it with: {install}"
        ) from error
