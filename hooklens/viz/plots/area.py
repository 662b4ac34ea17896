"""The area that curves are drawn in: from values to places on a drawing, and the axes around it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hooklens.display.elements import Element, element
from hooklens.viz.labels import readable
from hooklens.viz.plots.ticks import label_ticks, linear_ticks, log_ticks

# The width of a letter of a tick's label, in the drawing's units, which are pixels at full size.
_LETTER = 6.5
_MARGIN = 0.04


@dataclass(frozen=True, kw_only=True)
class PlotArea:
    """A drawing of a fixed size with two axes.

    Attributes:
        x: what is at each place: ascending numbers, or labels.
        low, high: the ends of the vertical axis.
        is_log: whether the vertical axis is logarithmic.
        width, height: of the drawing.
        left, right, top, bottom: the borders of the area between the axes.
    """

    x: tuple[float, ...] | tuple[str, ...]
    low: float
    high: float
    is_log: bool
    width: float = 720.0
    height: float = 330.0
    left: float = 78.0
    right: float = 708.0
    top: float = 10.0
    bottom: float = 282.0

    @classmethod
    def around(cls, values: Iterable[float], x: tuple[float, ...] | tuple[str, ...], *, is_log: bool) -> "PlotArea":
        """The area whose vertical axis holds all values, with a little room.

        Args:
            values: what is to be drawn; NaN and infinities count for nothing.
            x: what is at each place.
            is_log: whether the vertical axis is logarithmic; then all values are above 0.
        """
        finite = [value for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0) if not is_log else (1.0, 10.0)
        if is_log:
            room = (high / low) ** _MARGIN if high > low else 2.0
            return cls(x=x, low=low / room, high=high * room, is_log=True)
        # A single value has room around it that is large enough to be told apart from it.
        room = (high - low) * _MARGIN if high > low else abs(high) * 0.1 or 1.0
        return cls(x=x, low=low - room, high=high + room, is_log=False)

    def x_of(self, place: int) -> float:
        """Where the place with this number is."""
        if isinstance(self.x[0], str):
            return self._across(float(place))
        return self._across(float(self.x[place]))

    def _across(self, number: float) -> float:
        first, last = (0.0, len(self.x) - 1.0) if isinstance(self.x[0], str) else (float(self.x[0]), float(self.x[-1]))
        share = (number - first) / (last - first) if last > first else 0.5
        inset = 8.0
        return self.left + inset + (self.right - self.left - 2 * inset) * share

    def y_of(self, value: float) -> float | None:
        """How far down a value is; None where it is not finite."""
        if not math.isfinite(value):
            return None
        ends = (self.low, self.high)
        low, high, at = map(math.log10, (*ends, value)) if self.is_log else (*ends, value)
        return self.bottom - (self.bottom - self.top) * (at - low) / (high - low)

    def draw_axes(self, x_name: str, y_name: str) -> Element:
        """Both axes with their marks and names."""
        marks = []
        for value, text in (log_ticks if self.is_log else linear_ticks)(self.low, self.high):
            y = self.y_of(value)
            assert y is not None
            marks.append(
                element("line", class_="hl-grid-line", x1=self.left, x2=self.right, y1=f"{y:.5g}", y2=f"{y:.5g}")
            )
            marks.append(element("text", text, x=self.left - 7, y=f"{y + 4:.5g}", text_anchor="end"))
        for number, text in self._x_ticks():
            x = f"{self._across(number):.5g}"
            marks.append(element("line", class_="hl-axis", x1=x, x2=x, y1=self.bottom, y2=self.bottom + 4))
            marks.append(element("text", text, x=x, y=self.bottom + 17, text_anchor="middle"))
        middle = (self.top + self.bottom) / 2
        marks += [
            element("line", class_="hl-axis", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom),
            element("text", readable(x_name), x=(self.left + self.right) / 2, y=self.height - 10, text_anchor="middle"),
            element("text", readable(y_name), transform=f"translate(14 {middle:g}) rotate(-90)", text_anchor="middle"),
        ]
        return element("g", marks, class_="hl-axes")

    def _x_ticks(self) -> list[tuple[float, str]]:
        if isinstance(self.x[0], str):
            labels = [readable(str(label), 14) for label in self.x]
            return label_ticks(labels, self.right - self.left, _LETTER)
        numbers = [float(number) for number in self.x]
        if len(numbers) == 1:
            return [(numbers[0], f"{numbers[0]:g}")]
        ticks = linear_ticks(numbers[0], numbers[-1], 10)
        if all(number == int(number) for number in numbers):
            return [(round(place), f"{round(place):,}") for place, _ in ticks if abs(place - round(place)) < 1e-9]
        return ticks
