"""Which columns of a cache are tokens, with the host's knowledge of whether any is padding."""

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.kv_cache.inference import lasting_tensors


class ColumnMask:
    """A mask of columns, and whether any of them is padding.

    That is known without a look at the device: it is looked up when a mask is handed in, and kept up from there on. A
    mask whose values are changed in place is looked at again.

    Args:
        columns: `[batch pos]`, True for tokens.
        has_padding: whether any is False; None: look.
    """

    def __init__(self, columns: Bool[Tensor, "batch pos"], *, has_padding: bool | None = None) -> None:
        if columns.is_inference():
            # Inference tensors count no changes and cannot be saved for a backward pass.
            with lasting_tensors():
                columns = columns.clone()
        self.columns = columns
        self._version = columns._version
        self._has_padding = _look(columns) if has_padding is None else has_padding

    @property
    def has_padding(self) -> bool:
        """Whether any column is padding."""
        if self.columns._version != self._version:
            self._version = self.columns._version
            self._has_padding = _look(self.columns)
        return self._has_padding

    def join(self, new: Bool[Tensor, "rows new"], *, all_tokens: bool | None) -> "ColumnMask":
        """The mask over past + new columns; one past row serves any number of new ones.

        Args:
            new: the mask of the new columns.
            all_tokens: whether `new` hides nothing; None: look, where that decides anything.
        """
        hides = self.has_padding or (_look(new) if all_tokens is None else not all_tokens)
        with lasting_tensors():
            columns = torch.cat([self.columns.expand(new.shape[0], -1), new.to(self.columns.device)], dim=1)
        return ColumnMask(columns, has_padding=hides)

    def part(self, columns: Bool[Tensor, "batch pos"]) -> "ColumnMask":
        """The mask of some of the rows or columns, given those."""
        return ColumnMask(columns, has_padding=None if self.has_padding else False)

    def same(self, columns: Bool[Tensor, "batch pos"]) -> "ColumnMask":
        """The mask of the same columns in another tensor."""
        return ColumnMask(columns, has_padding=self.has_padding)


def _look(columns: Tensor) -> bool:
    """Whether any is False. Tensors without data may hide something."""
    if columns.numel() == 0:
        return False
    return columns.is_meta or not bool(columns.all())
