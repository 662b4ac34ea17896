"""What views share: the scale of their colours, the line that is read out, and numbers for their scripts."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from hooklens.display.colours import diverging, sequential
from hooklens.display.elements import Element, element
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.errors import InputError

Scale = Literal["signed", "amount"]
"""`"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest."""


def check_scale(scale: str, subject: str) -> None:
    """Refuse what is no scale.

    Raises:
        InputError: it is none.
    """
    if scale not in ("signed", "amount"):
        raise InputError(f"{subject}: scale is {scale!r}; expected 'signed' or 'amount'")


def paint(value: float, largest: float, scale: Scale) -> str:
    """The style of what has a value."""
    return diverging(value, largest) if scale == "signed" else sequential(value, largest)


def furthest(values: Iterable[float]) -> float:
    """The largest distance from 0 of the finite ones; 0 where there is none."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def gradient(scale: Scale) -> str:
    """The ground of a bar that runs from the lower end of a scale to the upper."""
    steps = [step / 8 for step in range(-8 if scale == "signed" else 0, 9)]
    stops = ",".join(paint(step, 1.0, scale).removeprefix("background:") for step in steps)
    return f"linear-gradient(90deg,{stops})"


def scale_bar(largest: float, scale: Scale) -> Element:
    """The colours and the values at their ends."""
    low = -largest if scale == "signed" else 0.0
    return element(
        "div",
        element("span", format_number(low)),
        element("i", style=f"background:{gradient(scale)}"),
        element("span", format_number(largest)),
        class_="hl-scale",
        aria_hidden="true",
    )


def readout(rest: str) -> Element:
    """The line that tells what the mouse or the keyboard is on, and says how to use the view when it is on nothing."""
    return element("div", rest, class_="hl-readout hl-faint", aria_live="polite")


def read_script(path: Path) -> str:
    """A view's script, behind what the scripts of views share: `rove` and `point`."""
    return read_asset(Path(__file__).with_name("rove.js")) + "\n" + read_asset(path)


def round_for_script(value: float, digits: int = 4) -> float | None:
    """A number in a few significant digits, as JSON holds it; what is not finite is None."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
