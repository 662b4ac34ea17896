"""Batches of recorded tokens in random order, from a buffer that is filled again as it empties."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hooklens.datasets.manifest import Manifest


@runtime_checkable
class Shards(Protocol):
    """What shards are read from."""

    manifest: Manifest

    def shard(self, number: int) -> Mapping[str, Tensor]:
        """The tensors of one file."""
        ...


class ShuffledBatches(IterableDataset[dict[str, Tensor]]):
    """Batches of all tokens, each of which comes once.

    Args:
        dataset: where shards are read from.
        sites: the hook points.
        batch_size: tokens of a batch.
        buffer: tokens that are mixed at a time; None: nothing is.
        seed: what the order of every epoch follows from.
        drop_last: leave the last batch out where it is smaller.

    Attributes:
        seed: of the order. In a worker the loader's own seed of the epoch stands in its place, the same for all of
            them.
    """

    def __init__(
        self,
        dataset: Shards,
        sites: Sequence[str],
        *,
        batch_size: int,
        buffer: int | None,
        seed: int,
        drop_last: bool,
    ) -> None:
        super().__init__()
        self._dataset, self._sites = dataset, list(sites)
        self._batch_size, self._buffer, self.seed, self._drop_last = batch_size, buffer, seed, drop_last
        self._epoch = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        epoch_seed = (self.seed * 1_000_003 + self._epoch) % 2**63 if worker is None else worker.seed - worker.id
        generator = torch.Generator().manual_seed(epoch_seed)
        self._epoch += 1
        n_shards = len(self._dataset.manifest.shards)
        order = list(range(n_shards))
        if self._buffer is not None:
            order = torch.randperm(n_shards, generator=generator).tolist()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        yield from self._batch(self._mixed(order, generator))

    def _mixed(self, order: Sequence[int], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Tokens in pieces: buffers full, of which half is given away in random order each time."""
        if self._buffer is None:
            for number in order:
                yield {name: self._dataset.shard(number)[name] for name in self._sites}
            return
        held: dict[str, Tensor] | None = None
        for number in order:
            shard = {name: self._dataset.shard(number)[name] for name in self._sites}
            size = len(next(iter(shard.values())))
            # Pieces of a shard come in random order, too, so that the buffer holds tokens from all over it.
            piece = max(1, self._buffer // 4)
            starts = range(0, size, piece)
            for place in torch.randperm(len(starts), generator=generator).tolist():
                new = {name: shard[name][starts[place] : starts[place] + piece] for name in self._sites}
                held = new if held is None else {name: torch.cat([held[name], new[name]]) for name in self._sites}
                if len(held[self._sites[0]]) >= self._buffer:
                    given, held = self._give(held, self._buffer // 2, generator)
                    yield given
        if held is not None:
            yield self._give(held, len(held[self._sites[0]]), generator)[0]

    def _give(
        self, held: dict[str, Tensor], n: int, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Some of the tokens, drawn at random, and the others."""
        order = torch.randperm(len(held[self._sites[0]]), generator=generator)
        return tuple({name: held[name][part] for name in self._sites} for part in (order[:n], order[n:]))  # type: ignore[return-value]

    def _batch(self, pieces: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        left: dict[str, Tensor] | None = None
        for piece in pieces:
            whole = piece if left is None else {name: torch.cat([left[name], piece[name]]) for name in self._sites}
            size = len(whole[self._sites[0]])
            n_full = size // self._batch_size * self._batch_size
            for first in range(0, n_full, self._batch_size):
                yield {name: whole[name][first : first + self._batch_size] for name in self._sites}
            left = {name: whole[name][n_full:] for name in self._sites} if n_full < size else None
        if left is not None and not self._drop_last:
            yield left
