"""The errors of patching experiments."""

from typing import TYPE_CHECKING

from hooklens.errors import HookLensError

if TYPE_CHECKING:
    from hooklens.patching.results.result import SweepResult


class SiteError(HookLensError, ValueError):
    """A site, layer, position or head to patch is not in the model or the prompts."""


class MetricError(HookLensError, ValueError):
    """A metric gives no usable value."""


class SweepInterruptedError(HookLensError, RuntimeError):
    """A sweep stopped before its end.

    Attributes:
        result: what it had measured; cells that were not run are NaN.
    """

    def __init__(self, message: str, result: "SweepResult") -> None:
        super().__init__(message)
        self.result = result
