"""Dtypes as pools' configurations write them: PyTorch's names, and FusionBench's short ones."""

import torch

from hooklens.arguments import read_dtype
from hooklens.errors import HookLensError, InputError

_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def read_pool_dtype(given: object, *, what: str, error: type[HookLensError] = InputError) -> torch.dtype | str | None:
    """A floating dtype by itself or by name, `"auto"` for the checkpoint's own, or None.

    Raises:
        HookLensError: anything else.
    """
    if given is None or (isinstance(given, str) and given == "auto"):
        return given
    named = _SHORT.get(given, given) if isinstance(given, str) else given
    try:
        return read_dtype(named, what=what, error=error)
    except error as found:
        raise error(f"{found}, or one of {', '.join(_SHORT)}, auto, or None") from found.__cause__
