"""The errors of patching experiments."""

from typing import Any

from hooklens.errors import HookLensError


class SiteError(HookLensError, ValueError):
    """A site, layer, position or head to patch is not in the model or the prompts."""


class MetricError(HookLensError, ValueError):
    """A metric gives no usable value."""


class SmallDifferenceWarning(UserWarning):
    """The unpatched runs nearly agree, so what is divided by their difference says little."""


class SweepInterruptedError(HookLensError, RuntimeError):
    """A sweep or another experiment stopped before its end.

    Attributes:
        result: what it had measured, as the experiment would give it; what was not run is NaN.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result
