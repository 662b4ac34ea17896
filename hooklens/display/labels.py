"""Tokens as labels: a token's spaces and line breaks are part of what it is, so they are made visible."""

_VISIBLE = str.maketrans(
    {
        " ": "\N{MIDDLE DOT}",
        "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\t": "\N{RIGHTWARDS ARROW}",
        "\r": "\N{SYMBOL FOR CARRIAGE RETURN}",
    }
)


def visible(token: str, most: int | None = None) -> str:
    """A token with its white space made visible: `" John"` is `"·John"`, a line break `"↵"`.

    Args:
        token: the text of one token.
        most: the most characters to write, an ellipsis among them; None writes all.
    """
    text = token.translate(_VISIBLE)
    return text if most is None or len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
