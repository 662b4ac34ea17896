"""Labels that callers give, and how plotly and matplotlib are handed them."""

from collections.abc import Sequence

from hooklens.display.labels import visible
from hooklens.errors import InputError


def read_labels(given: Sequence[object], size: int, *, subject: str, what: str) -> tuple[str, ...]:
    """Labels as texts, one for each place.

    Args:
        given: texts, or what is written as `str` writes it.
        size: how many places there are.
        subject: the view, for messages.
        what: what the labels are of, for messages: `"columns"`.

    Raises:
        InputError: a single text in place of several, or another number of labels.
    """
    if isinstance(given, str):
        raise InputError(f"{subject}: the labels of {what} are the text {given!r}; expected a list of {size} labels")
    if len(given) != size:
        raise InputError(f"{subject}: {len(given)} labels are given for {what}, and the values have {size}")
    return tuple(map(str, given))


def for_matplotlib(label: str) -> str:
    """A label that matplotlib writes as it is: dollars would begin a formula."""
    return visible(label).replace("$", r"\$")


def for_plotly(label: str) -> str:
    """A label that plotly writes as it is: it reads some tags."""
    return visible(label).replace("&", "&amp;").replace("<", "&lt;")
