"""Arguments that several commands take, in one wording."""

from typing import Annotated

import typer

from hooklens.errors import InputError


def read_text(given: str | list[str] | None) -> str | list[str] | None:
    """Text from the command line.

    Raises:
        InputError: it holds bytes that are no text in the terminal's encoding, which no tokenizer reads.
    """
    for text in [given] if isinstance(given, str) else given or []:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{text!r} is no text: it holds bytes that are not in the terminal's encoding") from error
    return given


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a checkpoint, a name on the Hugging Face hub, or a bundled one (bundled:tiny-llama).",
    ),
]
