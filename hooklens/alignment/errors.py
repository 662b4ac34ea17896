"""The errors of alignment search."""

from typing import Any

from hooklens.errors import HookLensError


class AlignmentError(HookLensError, ValueError):
    """A causal model, counterfactuals, a site or a basis do not go together."""


class AlignmentInterruptedError(HookLensError, RuntimeError):
    """Training or a search stopped before its end.

    Attributes:
        result: what there was by then, as the call would give it.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result
