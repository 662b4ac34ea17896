"""Names that differ by layer, written as one: `blocks.{0-3}.attn.hook_z`."""

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# Of this library's names, and of those that checkpoints of transformers have.
_LAYER = r"\b(?:blocks|layers)\.(\d+)\b"


def format_numbers(numbers: Sequence[int]) -> str:
    """Whole numbers in short, runs of them by their ends: `"0-3,7"`."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)


def merge_layers(named: Iterable[tuple[str, Key]]) -> list[tuple[str, Key, int]]:
    """Names that differ in their layer alone and have the same key, each as one.

    Args:
        named: names, and what has to be equal for two of them to be merged.

    Returns:
        In the order in which they first come: the merged name, the key, and how many names it stands for.
    """
    groups: dict[tuple[str, Key], list[int]] = {}
    for name, key in named:
        found = re.search(_LAYER, name)
        template = name if found is None else f"{name[: found.start(1)]}\0{name[found.end(1) :]}"
        groups.setdefault((template, key), []).append(-1 if found is None else int(found[1]))
    merged = []
    for (template, key), layers in groups.items():
        places = sorted(set(layers))
        written = format_numbers(places)
        merged.append((template.replace("\0", f"{{{written}}}" if len(places) > 1 else written), key, len(layers)))
    return merged


def layer_of_name(name: str) -> int | None:
    """The layer that a name speaks of; None where it speaks of none."""
    found = re.search(_LAYER, name)
    return None if found is None else int(found[1])
