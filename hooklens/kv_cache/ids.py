"""Which token ids the columns of a cache are, as far as it has been told."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.errors import CacheError
from hooklens.kv_cache.inference import lasting_tensors


class ColumnIds:
    """The token ids of the leading columns of a cache.

    Columns filled from a residual stream have no ids, and neither have those behind them, so what is known is always
    a beginning. Nothing is read from the device.

    Args:
        known: ids of the leading columns; what stands in columns of padding says nothing.
    """

    def __init__(self, known: Int[Tensor, "batch known"]) -> None:
        self._known = known

    @classmethod
    def none(cls, batch_size: int, device: torch.device) -> "ColumnIds":
        """No column's ids."""
        with lasting_tensors():
            return cls(torch.empty(batch_size, 0, dtype=torch.long, device=device))

    def all_of(self, n_columns: int) -> Int[Tensor, "batch pos"] | None:
        """The ids of a cache of so many columns; None where some are not known."""
        return self._known if self._known.shape[1] == n_columns else None

    def join(self, new: Int[Tensor, "batch new"] | None, *, n_columns: int) -> "ColumnIds":
        """The ids with new columns behind `n_columns`; None: the new ones are not known."""
        past = self.all_of(n_columns)
        if past is None or new is None:
            return self
        with lasting_tensors():
            return ColumnIds(torch.cat([past, new.to(past.device, torch.long)], dim=1))

    def change(self, change: Callable[[Tensor], Tensor]) -> "ColumnIds":
        """The ids of other rows or fewer columns, or elsewhere."""
        return ColumnIds(change(self._known))


def read_token_ids(given: object, *, batch: int, n_columns: int, what: str = "token_ids") -> Int[Tensor, "batch pos"]:
    """Token ids of columns as int64, a tensor of their own.

    Raises:
        CacheError: no integer tensor, or another shape.
    """
    expected = f"integers [{batch}, {n_columns}], one for each column"
    if not isinstance(given, Tensor):
        raise CacheError(f"{what}: found a {type(given).__name__}; expected a tensor of {expected}")
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not whole or tuple(given.shape) != (batch, n_columns):
        raise CacheError(f"{what}: found {given.dtype} {list(given.shape)}; expected {expected}")
    with lasting_tensors():
        return given.detach().to(torch.long, copy=True)


def rows_of_ids(ids: Int[Tensor, "batch pos"] | None, mask: Bool[Tensor, "batch pos"]) -> list[list[int]]:
    """The ids of each row without padding, in plain numbers.

    Raises:
        CacheError: they are not known.
    """
    if ids is None:
        raise CacheError(
            "the cache does not know which tokens it holds (it was filled from a residual stream or by hand, or saved "
            "without them), so text that goes on from them cannot be encoded, and what looks at a row's tokens cannot "
            "see them. Make it with model.prefill(prefix), or tell it: cache.token_ids = ids [batch pos]"
        )
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, shown in zip(row, shows, strict=True) if shown] for row, shows in rows]
