"""A data set as one of Hugging Face's `datasets`: tokens in a table, activations read when rows are looked at."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.datasets.dataset import ActivationDataset

INDEX = "index"


class ReadActivations:
    """Puts beside the columns of some rows the activations that their `index` names.

    Args:
        dataset: where activations are read.
        sites: the hook points.
    """

    def __init__(self, dataset: "ActivationDataset", sites: Sequence[str]) -> None:
        self._dataset, self._sites = dataset, list(sites)

    def __call__(self, rows: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int] | Tensor]:
        """The columns, and `[row ...]` for each hook point."""
        if INDEX not in rows:
            # The column was left out, and with it what is read by it.
            return dict(rows)
        numbers = list(rows[INDEX])
        return {**rows, **{name: self._dataset.site(name)[numbers] for name in self._sites}}


def make_view(dataset: "ActivationDataset", sites: Sequence[str]) -> Any:
    """The view; see `ActivationDataset.to_hf`."""
    package = import_package("datasets")
    columns = {
        INDEX: range(len(dataset)),
        "token": dataset.tokens().numpy(),
        "document": dataset.documents().numpy(),
        "position": dataset.positions().numpy(),
    }
    return package.Dataset.from_dict(columns).with_transform(ReadActivations(dataset, sites))
