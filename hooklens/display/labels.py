"""Tokens as labels: a token's spaces and line breaks are part of what it is, so they are made visible."""

from hooklens.display.elements import UNWRITABLE

# Characters that show nothing, or that turn the order of the text around them. The joiner of emoji is not among them.
_HIDDEN = (
    0x00A0,
    0x00AD,
    0x061C,
    *range(0x200B, 0x200D),
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2065),
    *range(0x2066, 0x206A),
    0xFEFF,
)

_VISIBLE = {
    **UNWRITABLE,
    **{code: f"[U+{code:04X}]" for code in _HIDDEN},
    ord(" "): "\N{MIDDLE DOT}",
    ord("\n"): "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    ord("\t"): "\N{RIGHTWARDS ARROW}",
    ord("\r"): "\N{SYMBOL FOR CARRIAGE RETURN}",
}


def visible(token: str, most: int | None = None) -> str:
    """A token with its white space made visible: `" John"` is `"·John"`, a line break `"↵"`.

    Control characters have their symbols, characters without a picture of their own their number: `"[U+200B]"`.

    Args:
        token: the text of one token.
        most: the most characters to write, an ellipsis among them; None writes all.
    """
    text = token.translate(_VISIBLE)
    return text if most is None or len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
