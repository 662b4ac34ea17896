"""What a verification found: one result per check and subject, and the report of them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hooklens.display import Displayed, Element, Listing, Summary, columns, table
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

_COLUMNS = ("check", "subjects", "nearest to its bound", "result")
_FAILED = "color:var(--hl-against);font-weight:600"
_MOST_FAILURES = 50

Relation = Literal["<=", ">", "=="]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One measured number and what it had to be.

    Attributes:
        check: what was checked, a name that all results of a check share.
        subject: what it was checked on: a hook point, a dtype and padding, a file.
        measured: the number found.
        bound: the number it is held against.
        relation: how `measured` must stand to `bound`.
        message: what the numbers are, and on a failure what to look at.
    """

    check: str
    subject: str
    measured: float
    bound: float
    relation: Relation = "<="
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the number is what it had to be; NaN never is."""
        if self.relation == "<=":
            return self.measured <= self.bound
        if self.relation == ">":
            return self.measured > self.bound
        return self.measured == self.bound

    @property
    def severity(self) -> float:
        """How near the number is to its bound; above 1 is a failure."""
        if not self.passed:
            return float("inf")
        if self.relation == "==" or self.bound == 0:
            return 0.0
        return self.measured / self.bound if self.relation == "<=" else self.bound / self.measured

    def __str__(self) -> str:
        """The result in one line."""
        verdict = "passed" if self.passed else "FAILED"
        found = f"{self.measured:.3g}, expected {self.relation} {self.bound:.3g}"
        return f"{verdict}  {self.check}, {self.subject}: {found}" + (f". {self.message}" if self.message else "")


class VerificationReport(Displayed):
    """All results of a verification.

    Attributes:
        subject: the model that was verified.
        results: one per check and subject, in the order in which they were made.
        notes: what was left out, sampled or compared differently, and why.
    """

    def __init__(self, subject: str, results: Sequence[CheckResult], notes: Sequence[str] = ()) -> None:
        self.subject = subject
        self.results = tuple(results)
        self.notes = tuple(notes)

    @property
    def passed(self) -> bool:
        """Whether every result passed, and there are any."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The results that did not pass."""
        return tuple(result for result in self.results if not result.passed)

    def by_check(self) -> dict[str, tuple[CheckResult, ...]]:
        """The results of each check."""
        names = dict.fromkeys(result.check for result in self.results)
        return {name: tuple(result for result in self.results if result.check == name) for name in names}

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per result: check, subject, passed, measured, relation, bound, message."""
        names = ["check", "subject", "passed", "measured", "relation", "bound", "message"]
        rows = [[getattr(result, name) for name in names] for result in self.results]
        made: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=names)
        return made

    def __str__(self) -> str:
        """A table with one line per check, the notes, and every failure."""
        lines = [
            self._headline(),
            "",
            *columns([_COLUMNS, *self._rows()], indent=0),
        ]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        if self.failures:
            lines += ["", f"{len(self.failures)} of {len(self.results)} results failed:"]
            lines += [f"  {failure}" for failure in self.failures]
        return "\n".join(lines)

    def _summary(self) -> Summary:
        rows = self._rows()
        failed = {(row, 3): _FAILED for row, cells in enumerate(rows) if cells[3] != "passed"}
        told = [f"{len(self.failures)} results failed; print(report) lists them"] if self.failures else []
        return Summary(
            title=f"VerificationReport: {self._headline()}",
            listing=Listing(columns=_COLUMNS, rows=rows, what="checks", styles=failed, more="print(report) has all"),
            notes=[*told, *self.notes],
            pages=[self._list_failures] if self.failures else [],
        )

    def _list_failures(self) -> list[Element]:
        shown = [(one.check, one.subject, one.measured, one.relation, one.bound, one.message) for one in self.failures]
        columns = ("check", "subject", "measured", "", "bound", "message")
        more = "report.failures has all"
        return table(columns, shown, caption="results that failed", most=_MOST_FAILURES, more=more)

    def _headline(self) -> str:
        if not self.results:
            return f"{self.subject}: nothing was checked"
        verdict = "passed" if self.passed else f"FAILED ({len(self.failures)} of {len(self.results)} results)"
        return f"{self.subject}: {verdict}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, results in self.by_check().items():
            worst = max(results, key=lambda result: result.severity)
            n_failed = sum(not result.passed for result in results)
            verdict = f"{n_failed} FAILED" if n_failed else "passed"
            nearest = f"{worst.measured:.2g} {worst.relation} {worst.bound:.2g} ({worst.subject})"
            rows.append((name, str(len(results)), nearest, verdict))
        return rows
