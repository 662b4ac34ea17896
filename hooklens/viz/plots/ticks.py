"""Where an axis has its marks, and what is written there."""

import math
from collections.abc import Sequence

from hooklens.display.numbers import format_number

_STEPS = (1.0, 2.0, 5.0, 10.0)


def linear_ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, at most `most` and at least two steps of 1, 2 or 5 times a power of ten.

    Args:
        low: the lower end.
        high: the upper end, above it.
        most: how many.

    Returns:
        The places and what is written there.
    """
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in _STEPS if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    places = [number * step for number in range(first, last + 1)]
    plain = max(abs(low), abs(high)) < 1e6 and decimals <= 4
    # As many digits as tell one place from the next.
    digits = 1 + max(1, math.ceil(math.log10(max(abs(low), abs(high)) / step)))
    return [(place, f"{place:,.{decimals}f}" if plain else format_number(place, digits)) for place in places]


def log_ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Powers of ten from `low` to `high`, with 2 and 5 times each where they are few; else round numbers.

    Args:
        low: the lower end, above 0.
        high: the upper end, above it.
        most: how many.

    Returns:
        The places and what is written there.
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        return [tick for tick in linear_ticks(low, high, most) if tick[0] > 0]
    if 3 * (last - first + 1) <= 2 * most:
        places = [size * 10.0**power for power in range(first - 1, last + 1) for size in _STEPS[:3]]
        return [(place, f"{place:,g}") for place in places if low <= place <= high]
    step = math.ceil((last - first + 1) / most)
    return [(10.0**power, format_number(10.0**power, 1)) for power in range(first, last + 1, step)]


def label_ticks(labels: Sequence[str], width: float, letter: float) -> list[tuple[float, str]]:
    """As many labels, evenly chosen, as stand beside each other.

    Args:
        labels: one for each place.
        width: of the axis.
        letter: of a letter, in the same unit.

    Returns:
        The places and what is written there.
    """
    longest = max(map(len, labels)) + 2
    step = max(1, math.ceil(len(labels) * longest * letter / width))
    return [(float(place), labels[place]) for place in range(0, len(labels), step)]
