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


def readable(name: str, most: int | None = None) -> str:
    """A name that may be a token: as `visible`, but that spaces between words stay spaces.

    Args:
        name: such as `"L3H5"`, `"the other 12"`, `" Mary"`.
        most: the most characters to write; None writes all.
    """
    inner = name.strip(" ")
    start = len(name) - len(name.lstrip(" ")) if inner else 0
    middle = " ".join(map(visible, inner.split(" "))) if inner else ""
    text = visible(name[:start]) + middle + visible(name[start + len(inner) :])
    return text if most is None or len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def for_matplotlib(text: str) -> str:
    """A text that matplotlib writes as it is: dollars would begin a formula."""
    return text.replace("$", r"\$")


def for_plotly(text: str) -> str:
    """A text that plotly writes as it is: it reads some tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
