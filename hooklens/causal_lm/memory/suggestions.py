"""What a call can leave out to take less memory, the largest first."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Held:
    """Which storages of a call are what; they are numbers that `peak_if` knows.

    Attributes:
        sites: those of each site that was kept, one or none.
        logits: those of the logits.
        graph: those kept for a backward pass that the call itself does not make.
        n_reads: positions that have logits.
        n_rows: rows of the batch.
        free: bytes that are free where the call runs; None: not known.
        peak: the peak there.
        peak_if: the peak there, if by number only a part of a storage's size were taken.
    """

    sites: Sequence[tuple[SiteBytes, Collection[int]]]
    logits: Collection[int]
    graph: Collection[int]
    n_reads: int
    n_rows: int
    free: int | None
    peak: int
    peak_if: Callable[[Mapping[int, float]], int]

    def spare(self, change: str, why: str, storages: Iterable[int], share: float = 0.0) -> Suggestion:
        """A change by which a part of some storages is left."""
        saves = self.peak - self.peak_if(dict.fromkeys(storages, share))
        return Suggestion(change=change, why=why, saves=saves)


def suggest(call: Mapping[str, Any], held: Held, device: torch.device) -> tuple[Suggestion, ...]:
    """Changes of a call that spare memory, by what they spare.

    Args:
        call: keywords of the call.
        held: what its storages are.
        device: where it runs.
    """
    found = [*_of_captures(call, held, device), *_of_logits(call, held), *_of_rows(held)]
    if held.graph:
        found.append(held.spare("torch.no_grad()", "intermediate results are kept for a backward pass", held.graph))
    worth = [one for one in found if one.saves >= _LEAST * held.peak]
    return tuple(sorted(worth, key=lambda one: -one.saves))


def _of_captures(call: Mapping[str, Any], held: Held, device: torch.device) -> Iterator[Suggestion]:
    by_word: dict[str, set[int]] = {}
    sizes: Counter[str] = Counter()
    for site, storages in held.sites:
        by_word.setdefault(site.word, set()).update(storages)
        sizes[site.word] += site.added
    kept = sizes.total()
    if not kept:
        return
    if len(by_word) > 1:
        largest = [(word, size) for word, size in sizes.most_common(3) if size >= kept / len(by_word)]
        shares = ", ".join(f"{word} {size / kept:.0%}" for word, size in largest)
        storages = {one for word, _ in largest for one in by_word[word]}
        change = "a names_filter without " + " ".join(word for word, _ in largest)
        yield held.spare(change, f"of what is kept these are {shares}", storages)
    # Whole numbers stay what they are.
    wide = [
        (site, storages) for site, storages in held.sites if site.dtype.is_floating_point and site.dtype.itemsize > 2
    ]
    if call.get("dtype") is None and wide:
        halved = {one for _, storages in wide for one in storages}
        share = 2 / max(site.dtype.itemsize for site, _ in wide)
        yield held.spare("dtype=torch.bfloat16", "activations are kept in more than 16 bits", halved, share)
    if device.type != "cpu" and call.get("device") is None:
        yield held.spare('device="cpu"', "activations are kept where the model runs", set().union(*by_word.values()))


def _of_logits(call: Mapping[str, Any], held: Held) -> Iterator[Suggestion]:
    free_to_choose = call.get("return_type", "logits") == "logits" and call.get("stop_at_layer") is None
    if free_to_choose and held.logits and call.get("logits_at") is None and held.n_reads > 1:
        why = f"{held.n_reads} positions have logits"
        yield held.spare("logits_at=-1", why, held.logits, 1 / held.n_reads)


def _of_rows(held: Held) -> Iterator[Suggestion]:
    if held.n_rows > 1 and held.free is not None and held.free < held.peak:
        each = -(-held.peak // held.n_rows)
        most = max(1, held.free // each)
        change = f"batches of {most} rows" if most > 1 else "one row at a time"
        yield Suggestion(change=change, why=f"a row takes about {format_bytes(each)}", saves=held.peak - most * each)
