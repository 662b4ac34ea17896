"""Colours for numbers: one hue for amounts, two for signed values, each with a colour for text that stands on it.

The two hues are blue and orange-red, which people who see few colours tell apart; values around 0 are nearly
transparent, so that they fade into a light page as into a dark one.
"""

import math

_FOR = (33, 102, 172)
_AGAINST = (200, 80, 20)


def sequential(value: float, largest: float = 1.0) -> str:
    """The style of a cell that holds an amount from 0 to `largest`: background and, where needed, text colour."""
    return _style(_FOR, value / largest if largest else 0.0)


def diverging(value: float, largest: float) -> str:
    """The style of a cell that holds a value from `-largest` to `largest`: blue above 0, orange below."""
    share = value / largest if largest else 0.0
    return _style(_FOR if share >= 0 else _AGAINST, abs(share))


def _style(hue: tuple[int, int, int], share: float) -> str:
    if not math.isfinite(share):
        return "background:repeating-linear-gradient(45deg,transparent 0 3px,rgba(127,127,127,.3) 3px 6px)"
    opacity = min(1.0, max(0.0, share))
    red, green, blue = hue
    # From here on text in the page's own colour is hard to read on one of the two grounds.
    text = ";color:#fff" if opacity > 0.6 else ""
    return f"background:rgba({red},{green},{blue},{opacity:.3g}){text}"
