"""A view: a picture of results that shows itself in a notebook and can be saved."""

from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hooklens.display.elements import Child
from hooklens.display.page import document, fragment
from hooklens.display.text import shorten
from hooklens.errors import InputError
from hooklens.files import replace_file

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150


class View(ABC):
    """A picture of results.

    A subclass says what it shows: as HTML for notebooks and pages (`_body`, with its `style` and `script`), as a
    figure for print (`to_matplotlib`), as a table (`to_dataframe`), and in words (`description`).
    """

    kind: ClassVar[str]
    """The name of this kind of view: what its style and script find it by."""

    style: ClassVar[str] = ""
    script: ClassVar[str] = ""

    heading: str
    """What the view shows, in one line."""

    @property
    def title(self) -> str:
        """What the view shows, in one line."""
        return self.heading

    @property
    @abstractmethod
    def description(self) -> list[str]:
        """What there is to see, in lines: the text in place of the picture, and the view's `repr`."""

    @abstractmethod
    def _body(self) -> list[Child]:
        """The view as HTML."""

    @abstractmethod
    def to_dataframe(self) -> "pandas.DataFrame":
        """The numbers that are shown."""

    @abstractmethod
    def to_matplotlib(self) -> "Figure":
        """The view as a figure for print.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """

    def __repr__(self) -> str:
        return shorten([self.title, *self.description], more="to_dataframe() has all")

    def _repr_html_(self) -> str:
        return fragment(*self._body(), label=self.title, kind=self.kind, style=self.style, script=self.script)

    def save(self, path: str | Path) -> None:
        """Write the view to a file, whole or not at all.

        Args:
            path: `.html`: a page that needs nothing else and follows the reader's light or dark setting; `.png`,
                `.svg` or `.pdf`: the figure of `to_matplotlib`.

        Raises:
            InputError: another kind of file, or it cannot be written.
            MissingDependencyError: a picture is wanted, and matplotlib is not installed.
        """
        kind = Path(path).suffix.lower()
        if kind == ".html":
            contents = document(self.title, self._repr_html_()).encode()
        elif kind in (".png", ".svg", ".pdf"):
            contents = draw(self.to_matplotlib(), kind[1:])
        else:
            raise InputError(
                f"save: {path} is of the kind {kind or 'without a suffix'!r}; expected .html, .png, .svg or .pdf"
            )
        try:
            with replace_file(path) as draft:
                draft.write_bytes(contents)
        except OSError as error:
            raise InputError(f"save: cannot write to {path}: {error}") from error


def draw(figure: Any, kind: str, *, transparent: bool = False) -> bytes:
    """A figure of matplotlib as the bytes of a file of a kind that matplotlib writes."""
    picture = BytesIO()
    figure.savefig(picture, format=kind, dpi=DOTS_PER_INCH, bbox_inches="tight", transparent=transparent)
    return picture.getvalue()
