"""Every error HookLens raises and every warning it gives on purpose, and the wording tools they share.

A message names its subject, says what was found, what was expected and what to do, and lists all
offenders at once. Each class also derives from the built-in exception that fits, so code that catches
`ValueError` or `LookupError` keeps working.
"""

import difflib
import sys
import warnings
from collections.abc import Collection


class HookLensError(Exception):
    """Base class of all errors that HookLens raises on purpose."""


class ConfigError(HookLensError, ValueError):
    """A configuration holds a value, or a combination of values, that describes no network."""


class InputError(HookLensError, ValueError):
    """What was handed to a model call (tokens, text, masks, positions, layers) cannot be run."""


class InsufficientMemoryError(HookLensError, MemoryError):
    """A call would take more memory than is free, which is known before it runs."""


class HookNameError(HookLensError, LookupError):
    """A name, glob or predicate selects no hook point."""


class HookOutputError(HookLensError, ValueError):
    """A hook returned something that cannot take the place of the tensor it was given."""


class EditError(HookLensError, ValueError):
    """An edit does not fit the tensor, positions, heads or rows that it names."""


class CheckpointError(HookLensError, ValueError):
    """A checkpoint is missing, damaged, or does not hold the tensors its config promises."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint's architecture, or a value in its config, is not implemented."""


class CacheError(HookLensError, ValueError):
    """An activation cache or key-value cache does not fit the use it is put to."""


class TransformError(HookLensError, ValueError):
    """A weight-processing step cannot hold for this architecture, or two records differ."""


class MissingDependencyError(HookLensError, ImportError):
    """An optional package is needed and not installed."""


class WorkerError(HookLensError, RuntimeError):
    """Processes that work for a call died again and again, or have other versions than the one that calls."""


class PaddingWarning(UserWarning):
    """Token ids look padded, but their padding cannot be told from tokens."""


class UnknownTokenWarning(UserWarning):
    """A text holds words that the tokenizer's vocabulary lacks."""


# Frames that stand between a caller's line and the place that warns: the package, and what calls it for the caller.
_BETWEEN = frozenset({"hooklens", "torch", "beartype", "jaxtyping", "contextlib"})


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that names the line outside HookLens from which the call came."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def suggest_names(name: str, candidates: Collection[str], *, limit: int = 3) -> str:
    """Phrase the candidates nearest to `name`: `" Did you mean 'a' or 'b'?"`, or an empty string."""
    nearest = difflib.get_close_matches(name, candidates, n=limit, cutoff=0.6)
    if not nearest:
        return ""
    return " Did you mean " + " or ".join(repr(match) for match in nearest) + "?"


def join_names(names: Collection[str], *, limit: int = 20) -> str:
    """List names for a message, saying how many were left out past `limit`."""
    ordered = list(names)
    shown = ", ".join(repr(name) for name in ordered[:limit])
    left_out = len(ordered) - limit
    return f"{shown} and {left_out} more" if left_out > 0 else shown
