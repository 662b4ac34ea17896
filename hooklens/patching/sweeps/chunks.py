"""Cells that run together, and what they measure: the piece of a sweep that whoever has the unpatched runs can do."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.runs.baseline import Baseline
from hooklens.patching.runs.sites import CellArray
from hooklens.patching.sweeps.in_full import run_in_full
from hooklens.patching.sweeps.packing import Segment
from hooklens.patching.sweeps.passes import Pass
from hooklens.patching.sweeps.plan import can_share


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Cells that run together.

    Attributes:
        cells: which.
        segments: what of them runs; None: each prompt runs in full, by itself.
    """

    cells: list[int]
    segments: list[Segment] | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a chunk came to.

    Attributes:
        cells: which.
        values: of each metric, `[cells pairs]`.
        forwards: passes that ran.
        token_layers: tokens that ran through a layer, counted once for each.
    """

    cells: list[int]
    values: list[Float[Tensor, "cells pairs"]]
    forwards: int
    token_layers: int


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkRunner:
    """Runs the cells of a sweep for a group of pairs.

    Attributes:
        model: the model.
        array: the cells of the sweep.
        baseline: the unpatched runs of the group.
        limit: how much runs at once.
        counts_tokens: the limit is of tokens, and else of rows.
    """

    model: HookedCausalLM
    array: CellArray
    baseline: Baseline
    limit: int
    counts_tokens: bool

    def split(self, segments: list[Segment]) -> Iterator[Chunk]:
        """Whole cells, as many as run at once, in the order in which they enter."""
        by_cell: dict[int, list[Segment]] = {}
        for segment in sorted(segments, key=lambda s: (s.layer, s.start, s.cell)):
            by_cell.setdefault(segment.cell, []).append(segment)
        chunk: list[Segment] = []
        size = 0
        for members in by_cell.values():
            cost = sum(self._cost(segment) for segment in members)
            if chunk and size + cost > self.limit:
                yield _make_chunk(chunk)
                chunk, size = [], 0
            chunk += members
            size += cost
        if chunk:
            yield _make_chunk(chunk)

    def run(self, chunk: Chunk) -> Measured:
        """Run a chunk, and measure it."""
        baseline = self.baseline
        if chunk.segments is None:
            forwards = len(chunk.cells) * len(baseline.pairs)
            token_layers = len(chunk.cells) * sum(baseline.lengths) * self.model.cfg.n_layers
            logits = torch.stack([self._run_in_full(cell) for cell in chunk.cells])
        else:
            logits, forwards, token_layers = self._run_segments(chunk.segments, chunk.cells)
        return Measured(
            cells=chunk.cells,
            values=list(baseline.metrics.measure(logits)),
            forwards=forwards,
            token_layers=token_layers,
        )

    def _run_in_full(self, cell: int) -> Float[Tensor, "pairs read d_vocab"]:
        pairs = range(len(self.baseline.pairs))
        return torch.stack([run_in_full(self.model, self.baseline, self.array.cells[cell], pair) for pair in pairs])

    def _cost(self, segment: Segment) -> int:
        return segment.stop - segment.start if self.counts_tokens else 1

    def _run_segments(self, segments: list[Segment], cells: list[int]) -> tuple[Tensor, int, int]:
        """Logits `[cells pairs read d_vocab]`; pairs whose patch changes nothing have the unpatched run's.

        Returns:
            The logits, how many passes ran, and tokens that ran through a layer.
        """
        baseline = self.baseline
        parts: list[list[Segment]] = [[]]
        size = 0
        for segment in sorted(segments, key=lambda s: (s.layer, s.start, s.cell)):
            size += self._cost(segment)
            lengths_clash = (
                not can_share(self.model, baseline)
                and parts[-1]
                and (parts[-1][-1].stop - parts[-1][-1].start != segment.stop - segment.start)
            )
            if parts[-1] and (size > self.limit or lengths_clash):
                parts.append([])
                size = self._cost(segment)
            parts[-1].append(segment)
        place = {cell: index for index, cell in enumerate(cells)}
        pieces, token_layers = [], 0
        for part in parts:
            run = Pass(self.model, baseline, self.array.cells, part)
            pieces.append(run.run())
            token_layers += run.token_layers
        found = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        ordered = [segment for part in parts for segment in part]
        at_cell = [place[segment.cell] for segment in ordered]
        at_pair = [segment.pair for segment in ordered]
        if len(baseline.pairs) == 1 and at_cell == list(range(len(cells))):
            return found[:, None], len(parts), token_layers
        logits = baseline.into_logits[None].repeat(len(cells), 1, 1, 1)
        logits[at_cell, at_pair] = found
        return logits, len(parts), token_layers


def _make_chunk(segments: list[Segment]) -> Chunk:
    return Chunk(cells=list(dict.fromkeys(segment.cell for segment in segments)), segments=segments)
