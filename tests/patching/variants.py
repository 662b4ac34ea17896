"""Which of the catalogue's checkpoints experiments are tried on by default; the others are tried in the slow tail."""

from collections.abc import Iterable
from typing import Any

from tests.checkpoints import VARIANTS
from tests.slow_cases import slow_but

KINDS = (
    "neox-parallel",
    "neox-sequential",
    "llama-gqa",
    "llama-biases",
    "llama-dynamic",
    "llama-yarn",
    "falcon-7b",
    "falcon-rw",
    "falcon-40b",
)
"""One of each wiring, sharing of keys and kind of position; to an experiment the others are of the same kinds."""


def variants(kinds: Iterable[str] = KINDS) -> list[Any]:
    """All variants as parameters of a test, those that are not of these kinds marked slow."""
    return slow_but(VARIANTS, tuple(kinds))
