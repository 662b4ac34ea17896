"""What several metrics say of the same runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from hooklens.display import Displayed, Element, Listing, Summary, fold
from hooklens.errors import HookLensError, suggest_names
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


@runtime_checkable
class _Result(Protocol):
    def to_dataframe(self) -> "pandas.DataFrame": ...


Result = TypeVar("Result", bound=_Result)


@dataclass(frozen=True, eq=False, repr=False)
class Results(Displayed, Mapping[str, Result], Generic[Result]):
    """The results of several metrics, by the names that the metrics were given.

    All are of the same forwards, which the `stats` of each count.

    Attributes:
        by_metric: the results.
    """

    by_metric: Mapping[str, Result]

    def __getitem__(self, name: str) -> Result:
        """The result of one metric.

        Raises:
            KeyError: there is no such metric; the message lists those that there are.
        """
        if name not in self.by_metric:
            raise KeyError(f"no metric is called {name!r}.{suggest_names(str(name), list(self.by_metric))}")
        return self.by_metric[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_metric)

    def __len__(self) -> int:
        return len(self.by_metric)

    def _summary(self) -> Summary:
        pages = []
        for name, one in self.items():
            result: object = one
            if isinstance(result, Displayed):
                pages.append(partial(_fold_result, name, result))
        return Summary(
            title=f"{type(self).__name__} of {len(self)} metrics",
            listing=Listing(
                columns=("metric", "result"),
                rows=[(name, repr(one).partition("\n")[0]) for name, one in self.items()],
                what="metrics",
                more="each is found by its name",
            ),
            pages=pages,
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell, with the columns of every metric side by side: `"<metric> value"` and so on.

        What says which cell it is, and is the same for all metrics, stands once.

        Raises:
            HookLensError: two metrics' columns would have one name.
        """
        tables = {name: one.to_dataframe() for name, one in self.items()}
        first = next(iter(tables.values()))
        shared = [
            column
            for column in first.columns
            if column not in _OF_METRIC
            and all(column in table and table[column].equals(first[column]) for table in tables.values())
        ]
        parts = [first[shared]]
        for name, table in tables.items():
            own = [column for column in table.columns if column not in shared]
            parts.append(table[own].rename(columns={column: f"{name} {column}" for column in own}))
        joined: pandas.DataFrame = import_package("pandas").concat(parts, axis=1)
        if joined.columns.has_duplicates:
            raise HookLensError(f"columns of {list(self)} have the same names; name the metrics otherwise")
        return joined


def _fold_result(name: str, result: Displayed) -> Element:
    return fold(name, result._summary().blocks())


# Columns that a metric has, also where the values happen to agree with another's.
_OF_METRIC = frozenset({"value", "normalized", "estimate", "standard_error", "faithfulness_hanna", "faithfulness_wang"})
