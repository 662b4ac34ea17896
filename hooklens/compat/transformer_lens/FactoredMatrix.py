"""`FactoredMatrix` of 2.x: HookLens's, with its errors and its text."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from hooklens.errors import InputError
from hooklens.weights import factored


class OperandError(InputError, AssertionError, IndexError, RuntimeError):
    """A refusal of HookLens's; 2.x raises one of the others, by where it happens to notice."""


def _as_2x(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **words: Any) -> Any:
        try:
            return method(*args, **words)
        except InputError as error:
            raise error if isinstance(error, OperandError) else OperandError(str(error)) from error

    return run


class FactoredMatrix(factored.FactoredMatrix):
    """HookLens's `FactoredMatrix`."""

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"


for _name in ("__init__", "__getitem__", "__matmul__", "__rmatmul__", "__mul__", "unsqueeze", "_require_square"):
    setattr(FactoredMatrix, _name, _as_2x(getattr(factored.FactoredMatrix, _name)))
