"""Arguments that several commands take, in one wording."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a checkpoint, a name on the Hugging Face hub, or a bundled one (bundled:tiny-llama).",
    ),
]
