"""Packing: patched rows, of which only the positions from the patch on are run, laid side by side.

A row patched at position `p` differs from the unpatched run at positions `p, p+1, ...` only. These columns are
its segment. Segments of different length would leave holes in a batch, so several stand in one row, each
attending to itself and, of the unpatched run's keys and values, to the columns before its start:

    keys      past (columns of the unpatched run)   row
              0 1 2 3 4                             2 3 4 5 | 4 5
    query 3   x x . . .                             x x . . | . .     (segment that starts at 2)
    query 4   x x x x .                             . . . . | x .     (segment that starts at 4)

The mask says so; attention is otherwise what it is for any batch on a frozen cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from hooklens.model.plan.positions import TokenPlan
from hooklens.model.plan.visibility import Hidden, Reach, Rule, Sides, Visibility, reach_rules
from hooklens.patching.runs.sites import Place

_FILLER = -1


@dataclass(frozen=True)
class Segment:
    """The columns `start` to `stop` of one pair, patched as one cell says.

    Attributes:
        cell: index of the cell.
        pair: index of the pair in its group.
        start: first column run.
        stop: one past the last column run.
        layer: first block run.
        at: where in the pair's prompt the cell patches.
    """

    cell: int
    pair: int
    start: int
    stop: int
    layer: int
    at: Place


class Packing:
    """Segments in the rows of a batch, rows in the order of the layer in which they enter.

    Attributes:
        segments: in the order given.
        row, offset: where each segment stands.
        width: columns of the batch.
        layers: the entry layer of each row, ascending.
        pairs: the pair of each row; segments in one row are of one pair.
        column: `[row width]`, the column of the pair's prompt that each place of the batch runs; holes run 0.
        n_past: how many columns of the unpatched run the segments need.
    """

    def __init__(self, segments: Sequence[Segment], *, device: torch.device) -> None:
        self.segments = list(segments)
        self.width = max(segment.stop - segment.start for segment in segments)
        self.n_past = max(segment.start for segment in segments)
        self.row, self.offset = [0] * len(segments), [0] * len(segments)
        self.layers: list[int] = []
        self.pairs: list[int] = []
        self._fill_rows()
        self._map_columns(device)

    def _fill_rows(self) -> None:
        """Put each segment, longest first, into the first row of its layer and pair that has room."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, segment in enumerate(self.segments):
            groups.setdefault((segment.layer, segment.pair), []).append(index)
        for layer, pair in sorted(groups):
            room: list[int] = []
            first = len(self.layers)
            for index in sorted(groups[layer, pair], key=lambda i: self.segments[i].start - self.segments[i].stop):
                length = self.segments[index].stop - self.segments[index].start
                place = next((i for i, free in enumerate(room) if free >= length), len(room))
                if place == len(room):
                    room.append(self.width)
                self.row[index], self.offset[index] = first + place, self.width - room[place]
                room[place] -= length
            self.layers += [layer] * len(room)
            self.pairs += [pair] * len(room)

    def _map_columns(self, device: torch.device) -> None:
        lengths = np.array([segment.stop - segment.start for segment in self.segments])
        starts = np.array([segment.start for segment in self.segments])
        corner = np.array(self.row) * self.width + np.array(self.offset)
        within = count_up(lengths)
        place = np.repeat(corner, lengths) + within
        size = len(self.layers) * self.width
        maps = np.zeros((3, size), dtype=np.int64)
        maps[2] = _FILLER
        maps[0, place] = np.repeat(starts, lengths) + within
        maps[1, place] = np.repeat(starts, lengths)
        maps[2, place] = np.repeat(np.arange(len(lengths)), lengths)
        self.n_holes = size - int(lengths.sum())
        shaped = torch.from_numpy(maps.reshape(3, len(self.layers), self.width)).to(device)
        self.column, self._start, self._segment = shaped.unbind()

    @property
    def is_plain(self) -> bool:
        """Whether each row is one segment from the same column on, as in any batch."""
        return (
            len(self.segments) == len(self.layers) and self.n_holes == 0 and len({s.start for s in self.segments}) == 1
        )

    def make_plan(self) -> "PackedPlan":
        """The plan of the whole batch."""
        return PackedPlan(self.column, self._start, self._segment, n_past=self.n_past)


@dataclass(frozen=True)
class BesideSegments:
    """No token sees the tokens of other segments, or what of the past its own segment runs anew.

    Attributes:
        start: `[row width]`, first column of the token's segment.
        segment: `[row width]`, which segment the token belongs to.
        column: `[row width]`, position of each token.
    """

    start: Int[Tensor, "row width"]
    segment: Int[Tensor, "row width"]
    column: Int[Tensor, "row width"]

    def acts(self, sides: Sides, keys: range) -> bool:
        """Always."""
        return True

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """The past from the segment's start on; of the row other segments, and later columns of its own."""
        n_past = sides.n_past
        past = torch.arange(keys.start, min(keys.stop, n_past), device=sides.device)
        in_past = past >= self.start[:, None, :, None]
        own = slice(max(keys.start - n_past, 0), max(keys.stop - n_past, 0))
        segment, column = self.segment[:, None], self.column[:, None]
        in_row = (segment[..., None] != segment[:, :, None, own]) | (column[:, :, None, own] > column[..., None])
        return torch.cat([in_past, in_row], dim=-1)


class PackedPlan(TokenPlan):
    """The tokens of packed segments: where they stand in their prompts, and what each may attend to.

    Args:
        column: `[row width]`, position of each token.
        start: `[row width]`, first column of the token's segment.
        segment: `[row width]`, which segment the token belongs to.
        n_past: columns of the frozen cache.
        whole: the plan of which this one is the first rows; its masks are shared.
    """

    def __init__(
        self,
        column: Int[Tensor, "row width"],
        start: Int[Tensor, "row width"],
        segment: Int[Tensor, "row width"],
        *,
        n_past: int,
        whole: "PackedPlan | None" = None,
    ) -> None:
        super().__init__(
            batch=len(column), n_new=column.shape[1], device=column.device, n_past=n_past, positions=column
        )
        self._column, self._start, self._segment = column, start, segment
        self._whole = whole

    def first_rows(self, n: int) -> "PackedPlan":
        """The plan of the first rows."""
        return PackedPlan(
            self._column[:n], self._start[:n], self._segment[:n], n_past=self.n_past, whole=self._whole or self
        )

    def _place_keys(self) -> Int[Tensor, "rows key"]:
        """The position of each key: those of the cache, then those of the row."""
        past = torch.arange(self.n_past, device=self.device).expand(self.batch, -1)
        return torch.cat([past, self._column], dim=1)

    def rules(self, reach: Reach) -> tuple[Rule, ...]:
        """Segments do not see each other."""
        return (BesideSegments(self._start, self._segment, self._column), *reach_rules(reach))

    def visibility(self, reach: Reach) -> Visibility:
        """What queries see; the masks of the whole batch serve its first rows."""
        if self._whole is None:
            return super().visibility(reach)
        return self._whole.visibility(reach).first_rows(self.batch)


def count_up(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`0, 1, ..., n-1` for each length `n`, one after another."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
