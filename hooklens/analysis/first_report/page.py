"""What a report holds, and its forms: text, a page, tables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hooklens.analysis.first_report.drawing import draw_document, draw_page, draw_text
from hooklens.arguments import read_path, reads
from hooklens.display import MOST_COLUMNS, clip, flatten, shorten
from hooklens.errors import CheckpointError, InputError
from hooklens.files import replace_file
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One question about a prompt: what stands out, the table that says so, and the call that makes the table.

    Attributes:
        name: `"predictions"`, `"lens"`, `"components"`, `"heads"`, `"sources"` or `"kinds"`.
        title: the question.
        sentences: what stands out, one or two.
        code: an expression that gives `table`, after the report's `setup`.
        table: the evidence, whole.
        shown: what a page shows of it.
        brief: the lines of `shown` that the text form has.
        bars: the columns of `shown` that a page draws as bars.
    """

    name: str
    title: str
    sentences: tuple[str, ...]
    code: str
    table: "pandas.DataFrame" = field(repr=False, compare=False)
    shown: "pandas.DataFrame" = field(repr=False, compare=False)
    brief: tuple[int, ...]
    bars: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a model does with a prompt, on one page.

    `print(report)` gives the page as text, a notebook shows it drawn, `report["heads"]` is one of its tables.

    Attributes:
        prompt: its text, or its ids as text.
        asked: what was asked of it, in words.
        setup: lines of code that the calls of the findings start from; `model` is the model, and `transport` the
            lens's where one was given.
        findings: what was found.
        skipped: what could not be asked of this model, and why, by the name that the finding would have.
    """

    prompt: str
    asked: str
    setup: tuple[str, ...]
    findings: tuple[Finding, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> "pandas.DataFrame":
        """The table of a finding.

        Raises:
            InputError: there is none of that name; says why, where it was left out.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding.table
        names = ", ".join(repr(finding.name) for finding in self.findings)
        why = dict(self.skipped).get(name)
        reason = "" if why is None else f" ({why})"
        raise InputError(f"the report has no table {name!r}{reason}; it has {names}")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One line for each sentence: `finding`, `sentence`, and `code`, the call that it is read from."""
        rows = [(one.name, sentence, one.code) for one in self.findings for sentence in one.sentences]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["finding", "sentence", "code"])
        return table

    def __str__(self) -> str:
        """The page as text, of at most 60 lines."""
        return draw_text(self)

    def __repr__(self) -> str:
        """The sentences, and what was left out."""
        lines = [self.headline, *(sentence for one in self.findings for sentence in one.sentences)]
        lines += [f"left out: {name}" for name, _ in self.skipped]
        return shorten([clip(flatten(line), MOST_COLUMNS) for line in lines], more="print(report) has all")

    def _repr_html_(self) -> str:
        """The page for a notebook, in the notebook's colours."""
        return draw_page(self)

    @reads(path=read_path)
    def save(self, path: str | Path) -> None:
        """Write the page as a file of HTML that needs nothing else, and follows the reader's light or dark setting.

        Args:
            path: the file.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with replace_file(path) as draft:
                draft.write_text(draw_document(self), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write a report to {path}: {error}") from error

    @property
    def headline(self) -> str:
        """What the report is on, in one line; a long prompt is shortened."""
        text, half = self.prompt, 40
        short = text if len(text) <= 2 * half + 5 else f"{text[:half]} ... {text[-half:]}"
        return f"Report on {short!r}"
