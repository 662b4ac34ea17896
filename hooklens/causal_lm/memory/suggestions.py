"""What a call can leave out to take less memory, the largest first."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hooklens.display import format_bytes

# What saves less than this part of the peak is not worth a word.
_LEAST = 0.05


@dataclass(frozen=True, kw_only=True)
class SiteBytes:
    """What a capture keeps of one hook point.

    Attributes:
        name: the hook point.
        shape: of the activation as it is kept.
        dtype: likewise.
        bytes: of its entries. Sites may share memory: the stream that leaves a block is the one that enters the next.
        added: bytes that are kept for this site and for none before it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    added: int

    @property
    def word(self) -> str:
        """The point without its layer and part: `"pattern"`."""
        return self.name.rpartition(".")[2].removeprefix("hook_")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change of the call, and what it spares.

    Attributes:
        change: what to write, or to do.
        why: what takes the memory.
        saves: about how many bytes of the peak it spares.
    """

    change: str
    why: str
    saves: int

    def __str__(self) -> str:
        """The suggestion in one line."""
        return f"{self.change} spares about {format_bytes(self.saves)}: {self.why}"


def suggest(
    sites: Sequence[SiteBytes],
    call: Mapping[str, Any],
    *,
    peak: int,
    logits: int,
    n_reads: int,
    n_rows: int,
    graph: int,
    free: int | None,
    device: torch.device,
) -> tuple[Suggestion, ...]:
    """Changes of a call that spare memory, by what they spare.

    Args:
        sites: what is kept.
        call: keywords of the call.
        peak: bytes that the call takes.
        logits: bytes of its logits.
        n_reads: positions that have logits.
        n_rows: rows of the batch.
        graph: bytes that are kept for a backward pass that the call itself does not make.
        free: bytes that are free on the device; None: not known.
        device: where the call runs.
    """
    kept = sum(site.added for site in sites)
    found = [*_of_captures(sites, call, kept, device), *_of_logits(call, logits, n_reads)]
    if graph:
        why = f"{format_bytes(graph)} of intermediate results are kept for a backward pass"
        found.append(Suggestion(change="torch.no_grad()", why=why, saves=graph))
    if n_rows > 1 and free is not None and free < peak:
        each = -(-peak // n_rows)
        most = max(1, free // each)
        why = f"a row takes about {format_bytes(each)}"
        found.append(Suggestion(change=f"batches of {most} rows" if most > 1 else "one row at a time", why=why, saves=peak - most * each))
    worth = [one for one in found if one.saves >= _LEAST * peak]
    return tuple(sorted(worth, key=lambda one: -one.saves))


def _of_captures(
    sites: Sequence[SiteBytes], call: Mapping[str, Any], kept: int, device: torch.device
) -> list[Suggestion]:
    if not kept:
        return []
    found = []
    by_word: Counter[str] = Counter()
    for site in sites:
        by_word[site.word] += site.added
    if len(by_word) > 1:
        largest = [(word, size) for word, size in by_word.most_common(3) if size >= kept / len(by_word)]
        shares = ", ".join(f"{word} {size / kept:.0%}" for word, size in largest)
        change = "a names_filter without " + " ".join(word for word, _ in largest)
        found.append(
            Suggestion(change=change, why=f"of what is kept these are {shares}", saves=sum(size for _, size in largest))
        )
    wide = sum(site.added for site in sites if site.dtype.is_floating_point and site.dtype.itemsize > 2)
    if call.get("dtype") is None and wide:
        why = "what is kept in more than 16 bits"
        found.append(Suggestion(change="dtype=torch.bfloat16", why=why, saves=wide // 2))
    if device.type != "cpu" and call.get("device") is None:
        found.append(Suggestion(change='device="cpu"', why="what is kept leaves the device", saves=kept))
    return found


def _of_logits(call: Mapping[str, Any], logits: int, n_reads: int) -> list[Suggestion]:
    free_to_choose = call.get("return_type", "logits") == "logits" and call.get("stop_at_layer") is None
    if not logits or call.get("logits_at") is not None or not free_to_choose or n_reads < 2:
        return []
    why = f"logits of {n_reads} positions take {format_bytes(logits)}"
    return [Suggestion(change="logits_at=-1", why=why, saves=logits - logits // n_reads)]
