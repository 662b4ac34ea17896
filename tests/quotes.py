"""Numbers that a text quotes: `**0.93**<!-- name -->`, bold for the reader, and the name of the variable for a test.

Numbers hold within rounding to the decimals shown; anything else is compared as text.
"""

import re
from decimal import Decimal

QUOTE = re.compile(r"\*\*(?P<text>[^*\n]+)\*\*<!-- (?P<name>\w+) -->")


def agrees(quoted: str, value: object) -> bool:
    """Whether a value is what was quoted, within rounding to as many decimals as are shown."""
    if not isinstance(value, int | float):
        return quoted == value
    shown = Decimal(quoted)
    # Half a unit in the last place is rounding; the rest is for processors that sum in another order.
    return abs(shown - Decimal(value)) <= Decimal("0.55").scaleb(int(shown.as_tuple().exponent))


def format_like(quoted: str, value: object) -> str:
    """A value with as many decimals as what was quoted has; text as it is."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.{len(quoted.partition('.')[2])}f}"
