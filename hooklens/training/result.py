"""What a training run gives, and what it stops with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from hooklens.display import Displayed, Listing, Summary, format_count
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.training.metrics import Record

if TYPE_CHECKING:
    import pandas

_SHOWN = 100


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainResult(Displayed):
    """A training run.

    Attributes:
        model: the model that was given, trained, in the mode it was in.
        step: how many steps were made.
        records: the metrics, an entry for every `log_every` steps and every evaluation: `step`; `loss`, the mean over
            the steps since the entry before; `learning_rate`, of the step; `grad_norm`, of the step before it was
            clipped; `eval_loss`.
        folder: the run's folder, for `hooklens.training.checkpoints`; None: there is none.
    """

    model: nn.Module
    step: int
    records: tuple[Record, ...]
    folder: Path | None

    def _summary(self) -> Summary:
        columns = list(dict.fromkeys(name for record in self.records for name in record))
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Summary(
            title=f"TrainResult: {self.step:,} steps",
            facts={
                "model": f"{type(self.model).__name__}, {format_count(n_parameters)} parameters",
                "folder": None if self.folder is None else str(self.folder),
            },
            listing=Listing(
                columns=columns,
                rows=[_cells(record, columns) for record in self.records[: -_SHOWN - 1 : -1]],
                what="entries",
                caption="metrics, the last first",
                n_rows=len(self.records),
            ),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """The metrics as a table, a row for each entry."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(list(self.records))
        return table


def _cells(record: Record, columns: list[str]) -> list[float | None]:
    """An entry in the order of the columns; steps are whole numbers."""
    return [int(record[name]) if name == "step" and name in record else record.get(name) for name in columns]


class TrainingInterruptedError(HookLensError, RuntimeError):
    """Training was interrupted before its last step.

    Attributes:
        result: what was trained so far; the model is as it was after `result.step` steps.
    """

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


class DivergedError(HookLensError, ArithmeticError):
    """The loss is no finite number any more."""
