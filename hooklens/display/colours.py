"""Colours for numbers: one hue for amounts, two for signed values.

The two hues are blue and orange-red, which people who see few colours tell apart. A colour is laid thinly over the
page's ground, the thicker the larger the value, so that values around 0 fade into a light page as into a dark one.
"""

import math

FOR = "var(--hl-blue)"
AGAINST = "var(--hl-orange)"
"""The hues, which the theme sets: brighter ones on a dark page."""

PRINTED_FOR = (33, 102, 172)
PRINTED_AGAINST = (200, 80, 20)
"""The same on white paper, in red, green and blue from 0 to 255."""

MOST_OPAQUE = 0.75
"""The opacity of the largest value. Beyond it, text in the page's own colour falls below the contrast of 4.5 to 1
that WCAG 2.2 asks for: near-black on the blue over white, near-white on the orange over black."""

NO_VALUE = "repeating-linear-gradient(45deg,transparent 0 3px,rgba(127,127,127,.3) 3px 6px)"
"""The ground of what has no value: hatching."""


def sequential(value: float, largest: float = 1.0) -> str:
    """The style of a cell that holds an amount from 0 to `largest`."""
    return _style(FOR, value / largest if largest else 0.0)


def diverging(value: float, largest: float) -> str:
    """The style of a cell that holds a value from `-largest` to `largest`: blue above 0, orange below."""
    share = value / largest if largest else 0.0
    return _style(FOR if share >= 0 else AGAINST, abs(share))


def _style(hue: str, share: float) -> str:
    if not math.isfinite(share):
        return f"background:{NO_VALUE}"
    return f"background:rgb({hue}/{MOST_OPAQUE * min(1.0, max(0.0, share)):.3g})"
