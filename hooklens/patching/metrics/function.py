"""Functions of logits as metrics."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.metric import Cells, Metric, Positions, Values

MetricFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FunctionMetric(Metric):
    """A function from logits `[batch pos d_vocab]` to values `[batch]`, as a metric.

    For a single pair the rows are patched runs, any number of them. For several pairs the function is called
    once per patch, and row `i` is pair `i`; rows are padded on the right.

    Attributes:
        fn: the function.
    """

    fn: MetricFunction
    _: KW_ONLY
    pos: Positions = None

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def needs_all_pairs(self) -> bool:
        """Always: a row's place says which pair it is."""
        return True

    def measure(self, logits: Cells) -> Values:
        """The function's values.

        Raises:
            MetricError: they are not one per row.
        """
        n_cells, n_pairs = logits.shape[:2]
        if n_pairs == 1:
            return self._call(logits[:, 0], n_cells)[:, None]
        return torch.stack([self._call(cell, n_pairs) for cell in logits])

    def _call(self, logits: Tensor, n_rows: int) -> Float[Tensor, " rows"]:
        values = self.fn(logits)
        if not isinstance(values, Tensor) or values.shape != (n_rows,):
            found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise MetricError(
                f"metric {self.name!r} returned {found} for logits {list(logits.shape)} [batch pos d_vocab]; expected "
                f"one value per row, [{n_rows}]: reduce over positions and vocabulary, not over rows"
            )
        return values


def as_metric(metric: Metric | MetricFunction) -> Metric:
    """The metric itself, or a function as one.

    Raises:
        MetricError: neither a metric nor callable.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise MetricError(
            f"a metric is a value such as patching.LogitDiff(answer, wrong) or a function from logits to one value per "
            f"row; got {type(metric).__name__}"
        )
    return FunctionMetric(metric)
