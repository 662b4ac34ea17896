"""Numbers as displays write them."""

import math
from collections.abc import Iterable


def format_number(number: float, digits: int = 3) -> str:
    """A number in a few significant digits: `"0.012"`, `"-3.40"`, `"1.2e-07"`; `"nan"` and `"inf"` by name."""
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number) or number == 0:
        return str(abs(number) if number == 0 else number)
    size = math.floor(math.log10(abs(number)))
    if not -4 <= size < 7:
        return f"{number:.{digits - 1}e}"
    decimals = max(0, digits - 1 - size)
    return f"{number:,.{decimals}f}"


def format_count(count: int) -> str:
    """A number of things, with a decimal prefix from ten thousand on: `"1,024"`, `"85.1 k"`, `"6.74 B"`."""
    if count < 10_000:
        return f"{count:,}"
    size = float(count)
    for unit in ("k", "M", "B"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} T"


def format_bytes(count: int) -> str:
    """A number of bytes with a decimal unit: `"5.72 kB"`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_shape(sizes: Iterable[int], axes: Iterable[str] | None = None) -> str:
    """A shape, with its axes where they are known: `"batch 1 x pos 15 x d_model 64"`, `"1 x 15 x 64"`."""
    if axes is None:
        return " x ".join(map(str, sizes))
    return " x ".join(f"{axis} {size}" for axis, size in zip(axes, sizes, strict=True))
