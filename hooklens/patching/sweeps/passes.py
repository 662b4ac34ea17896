"""One pass: patched rows enter at their layers, go up together, and are unembedded where the metric reads.

The rows of a pass are sorted by the layer in which they are patched. Going up, the batch grows: at each layer the
rows patched there join with the unpatched run's stream, so every block runs once for all rows that need it, and
for no others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.axes import find_site, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.call import NOBODY, Hook, Listeners, Listening, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.parts.adapted import whole_weight
from hooklens.model.plan.positions import TokenPlan
from hooklens.patching.runs.acting import Places, is_behind_attention
from hooklens.patching.runs.baseline import Baseline
from hooklens.patching.runs.sites import Cell
from hooklens.patching.runs.vocabulary import unembed
from hooklens.patching.sweeps.packing import Packing, Segment, count_up

# Up to so many keys a copy for each row and one attention call take less time than two calls put together.
_SHORT_PAST = 64


class Index(NamedTuple):
    """Entries of an activation: the rows, and what stands at its other axes."""

    rows: Tensor
    rest: tuple[Tensor | slice, ...]


class Reads(NamedTuple):
    """The tokens of a batch whose logits are read: for each its segment, which of the metric's positions it is, its
    column in the prompt, and its row and place in the batch.
    """

    segment: Tensor
    read: Tensor
    column: Tensor
    row: Tensor
    place: Tensor

    def places(self, chosen: Bool[Tensor, " token"]) -> tuple[Tensor, Tensor]:
        """Row and place of some of them."""
        return self.row[chosen], self.place[chosen]


class Pass:
    """Some segments, run as one growing batch.

    Args:
        model: the model.
        baseline: the unpatched runs.
        cells: all cells of the sweep, which segments name by index.
        segments: what to run.

    Attributes:
        token_layers: how many tokens went through how many blocks, in all.
    """

    def __init__(
        self, model: HookedCausalLM, baseline: Baseline, cells: Sequence[Cell], segments: Sequence[Segment]
    ) -> None:
        self.model, self.baseline, self.cells = model, baseline, cells
        self.packing = Packing(segments, device=model.device)
        self.segments = self.packing.segments
        self.pairs = torch.tensor(self.packing.pairs, device=model.device)
        self.token_layers = 0
        self._edits = self._collect_edits()

    def run(self) -> Float[Tensor, "segments read d_vocab"]:
        """The logits of every segment's prompt at the positions that the metric reads."""
        packing, n_layers = self.packing, self.model.cfg.n_layers
        plans = _Plans(packing, self.model.device)
        stream, n_rows = None, 0
        outside = thread_listeners()
        reads, wanted = self._find_reads(), None
        for layer in range(packing.layers[0], n_layers):
            n_inside = n_rows
            stream = self._join(stream, layer)
            n_rows = len(stream)
            plan = plans.of(n_rows)
            wanted = reads.places(reads.row < n_rows) if layer == n_layers - 1 and self._may_narrow(layer) else None
            standing = self._edits_in(layer, n_rows, n_inside)
            call = Call(join_listeners([outside, standing, self._listeners_in(layer)]), plan)
            stream = self.model.block_list()[layer](stream, plan, call, self._past(layer, n_rows), wanted=wanted)
            self.token_layers += n_rows * packing.width
        return self._read_logits(reads, self._gather(reads, stream, n_rows, narrow=wanted is not None))

    def _find_reads(self) -> "Reads":
        """The tokens of the batch that the metric reads; before its start a segment has none."""
        starts, stops, offsets, rows = torch.tensor(
            [
                [segment.start for segment in self.segments],
                [segment.stop for segment in self.segments],
                self.packing.offset,
                self.packing.row,
            ],
            device=self.model.device,
        )
        columns = self.baseline.reads[torch.tensor([segment.pair for segment in self.segments])]
        ran = (columns >= starts[:, None]) & (columns < stops[:, None])
        segment, read = ran.nonzero(as_tuple=True)
        column = columns[segment, read]
        return Reads(segment, read, column, rows[segment], column + (offsets - starts)[segment])

    def _may_narrow(self, layer: int) -> bool:
        """Whether nothing is changed in a block behind its attention, where only tokens that are read go on."""
        inside = [name for at, name in self._edits if at == layer and name != "stream"]
        edits = self.baseline.edits
        is_edited = edits is not None and edits.acts_behind_attention(layer)
        return not is_edited and not any(map(is_behind_attention, inside))

    def _edits_in(self, layer: int, n_rows: int, n_inside: int) -> Listeners:
        """What the experiment's edits do in a block, to rows of which the first come from the block below."""
        edits = self.baseline.edits
        if edits is None:
            return NOBODY
        places = Places(self.pairs[:n_rows], self.packing.column[:n_rows])
        return edits.in_layer(self.model, layer, places, n_inside)

    def _gather(
        self, reads: "Reads", stream: Tensor | None, n_rows: int, *, narrow: bool
    ) -> Float[Tensor, "token one d_model"]:
        """The last stream of the tokens that are read, from the `n_rows` rows that went through blocks and the rest.

        Where it is `narrow`, the first holds those tokens and no others.
        """
        ran = reads.row < n_rows
        parts = []
        if stream is not None:
            parts.append(stream if narrow else stream[reads.places(ran)][:, None])
        if n_rows < len(self.packing.layers):
            entering = self._enter(n_rows, len(self.packing.layers), self.model.cfg.n_layers)
            rows, places = reads.places(~ran)
            parts.append(entering[rows - n_rows, places][:, None])
        if len(parts) == 1:
            return parts[0]
        out = torch.empty_like(parts[0][:1]).repeat(len(ran), 1, 1)
        out[ran], out[~ran] = parts
        return out

    def _join(self, stream: Tensor | None, layer: int) -> Float[Tensor, "rows width d_model"]:
        """The rows so far, and those that enter at this layer with the unpatched run's stream, or a patched one."""
        layers = self.packing.layers
        first = 0 if stream is None else len(stream)
        last = next((row for row in range(first, len(layers)) if layers[row] > layer), len(layers))
        if stream is None:
            return self._enter(first, last, layer)
        return stream if first == last else torch.cat([stream, self._enter(first, last, layer)])

    def _enter(self, first: int, last: int, layer: int) -> Float[Tensor, "rows width d_model"]:
        """The rows that enter at a layer."""
        pairs, columns = self.pairs[first:last, None], self.packing.column[first:last]
        entering = self.baseline.streams[layer][pairs, columns]
        for index, values in self._edits.get((layer, "stream"), ()):
            entering[(index.rows - first, *index.rest)] = values
        return entering

    def _past(self, layer: int, n_rows: int) -> HookedKeyValueCacheEntry | None:
        """The unpatched run's keys and values before the segments: one row where all are of one pair."""
        n_past = self.packing.n_past
        if n_past == 0:
            return None
        keys, values = (tensor[:, :n_past] for tensor in self.baseline.keys_values[layer])
        if len(keys) > 1:
            rows = self.pairs[:1] if len(set(self.packing.pairs)) == 1 else self.pairs[:n_rows]
            keys, values = keys[rows], values[rows]
        # An entry that grows would store keys and values without the edits of single query heads, and so refuses them.
        if n_past > _SHORT_PAST or any(at == layer and name.endswith("_per_head") for at, name in self._edits):
            return HookedKeyValueCacheEntry(keys, values, frozen=True)
        keys, values = (tensor.expand(n_rows, -1, -1, -1) for tensor in (keys, values))
        return HookedKeyValueCacheEntry(keys, values)

    def _listeners_in(self, layer: int) -> Listeners:
        """The edits inside a block."""
        names = [name for at, name in self._edits if at == layer and name != "stream"]
        return self._put_in({name: self._edits[layer, name] for name in names})

    def _put_in(self, edits: dict[str, list[tuple[Index, Tensor]]]) -> Listeners:
        points = self.model.hook_points()
        return {
            points[name]: Listening([Hook(_PutIn(made), points[name], form="point")]) for name, made in edits.items()
        }

    def _collect_edits(self) -> dict[tuple[int, str], list[tuple[Index, Tensor]]]:
        """What to write where: by layer and hook name (`"stream"`: on entering), pairs of an index and values."""
        groups: dict[tuple[str, bool, bool], list[int]] = {}
        for index, segment in enumerate(self.segments):
            at = segment.at
            groups.setdefault((self.cells[segment.cell].name, at.head is None, at.pos is None), []).append(index)
        edits: dict[tuple[int, str], list[tuple[Index, Tensor]]] = {}
        for (name, *_), members in groups.items():
            entry = self.baseline.entries[name]
            if entry.stage == "head":
                continue
            site = find_site(name)
            assert site is not None
            made = self._edit_pattern(name, members) if "key" in site.axes else self._edit_columns(name, members)
            key = "stream" if entry.stage in ("stream", "written") else name
            edits.setdefault((entry.layer, key), []).append(made)
        return edits

    def _edit_columns(self, name: str, members: list[int]) -> tuple[Index, Tensor]:
        """The index and values for points whose second axis is the position."""
        which, columns = self._columns_of(members)
        device = self.model.device
        segments = [self.segments[i] for i in members]
        pairs = np.array([segment.pair for segment in segments])[which]
        rows, slots = self._places(members, which, columns)
        into, of = [rows, slots], [pairs, columns]
        heads = [segment.at.head for segment in segments]
        if heads[0] is not None:
            of.append(np.array(heads)[which])
        written = name in self.baseline.replaced
        if not written:
            into += of[2:]
        row, *rest = (torch.from_numpy(index).to(device) for index in into)
        at = tuple(torch.from_numpy(index).to(device) for index in of)
        return Index(row, tuple(rest)), self._stream_of(name, at) if written else self.baseline.values[name][at]

    def _stream_of(self, name: str, at: tuple[Tensor, ...]) -> Float[Tensor, "entries d_model"]:
        """The stream behind a block whose heads have written other vectors: pairs, columns and, of one head, heads."""
        layer = layer_of(name)
        assert layer is not None
        change = self.baseline.values[name][at] - self.baseline.replaced[name][at]
        W_O = self.model.block_list()[layer].attn.W_O
        if len(at) == 3:
            of_head, change = change, change.new_zeros(len(change), *W_O.shape[:2])
            change[torch.arange(len(change)), at[2]] = of_head
        written = F.linear(change.flatten(1), whole_weight(self.model.block_list()[layer].attn.o_proj))
        return self.baseline.streams[layer + 1][at[:2]] + written * self.model.cfg.residual_scale

    def _edit_pattern(self, name: str, members: list[int]) -> tuple[Index, Tensor]:
        """The index and values for scores and patterns: a key stands in the past or in the segment's own row."""
        device, n_past = self.model.device, self.packing.n_past
        queries_of, query = self._columns_of(members)
        segments = [self.segments[i] for i in members]
        sources = [segment.at.source for segment in segments]
        lengths = np.array([self.baseline.lengths[segment.pair] for segment in segments])
        n_keys = np.where([source is None for source in sources], lengths, 1)[queries_of]
        which = np.repeat(queries_of, n_keys)
        query = np.repeat(query, n_keys)
        key = count_up(n_keys) + np.array([source or 0 for source in sources])[which]
        rows, slots = self._places(members, which, query)
        starts = np.array([segment.start for segment in segments])[which]
        offsets = np.array([self.packing.offset[i] for i in members])[which]
        key_slots = np.where(key < starts, key, n_past + offsets + key - starts)
        pairs = np.array([segment.pair for segment in segments])[which]
        heads = [segment.at.head for segment in segments]
        tensors = [torch.from_numpy(one).to(device) for one in (rows, slots, key_slots, pairs, query, key)]
        row, slot, key_slot, pair, query_at, key_at = tensors
        head = slice(None) if heads[0] is None else torch.from_numpy(np.array(heads)[which]).to(device)
        values = self.baseline.values[name][pair, head, query_at, key_at]
        return Index(row, (head, slot, key_slot)), values

    def _columns_of(self, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The columns that segments' cells patch: for each, which of `members` it belongs to, and its number."""
        segments = [self.segments[i] for i in members]
        pos_of = [segment.at.pos for segment in segments]
        starts = np.array(
            [segment.start if pos is None else pos for segment, pos in zip(segments, pos_of, strict=True)]
        )
        counts = np.array(
            [segment.stop - segment.start if pos is None else 1 for segment, pos in zip(segments, pos_of, strict=True)]
        )
        return np.repeat(np.arange(len(members)), counts), np.repeat(starts, counts) + count_up(counts)

    def _places(self, members: list[int], which: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and place in the row of columns of segments."""
        starts = np.array([self.segments[i].start for i in members])
        offsets = np.array([self.packing.offset[i] for i in members])
        return np.array([self.packing.row[i] for i in members])[which], (offsets - starts)[which] + columns

    def _read_logits(
        self, reads: "Reads", stream: Float[Tensor, "token one d_model"]
    ) -> Float[Tensor, "segments read d_vocab"]:
        """Logits where the metric reads; before its start a segment's are those of the unpatched run."""
        patched, edits = self._put_in(self._edits_of_head(reads)), self.baseline.edits
        if edits is not None:
            pairs = self.pairs[torch.tensor(self.packing.row, device=self.model.device)[reads.segment]]
            standing = edits.listeners(self.model, Places(pairs, reads.column[:, None]), edits.names_in_head)
            patched = join_listeners([standing, patched])
        logits = unembed(self.model, stream, listeners=patched, vocabulary=self.baseline.vocabulary)[:, 0]
        shape = (len(self.segments), self.baseline.reads.shape[1])
        if len(logits) == shape[0] * shape[1]:
            return logits.view(*shape, -1)
        out = self.baseline.into_logits[torch.tensor([segment.pair for segment in self.segments])]
        out[reads.segment, reads.read] = logits
        return out

    def _edits_of_head(self, reads: "Reads") -> dict[str, list[tuple[Index, Tensor]]]:
        """The edits in the final norm and the unembedding."""
        edits: dict[str, list[tuple[Index, Tensor]]] = {}
        for index, segment in enumerate(self.segments):
            name = self.cells[segment.cell].name
            if self.baseline.entries[name].stage != "head":
                continue
            pos = segment.at.pos
            at = reads.segment == index if pos is None else (reads.segment == index) & (reads.column == pos)
            [read] = at.nonzero(as_tuple=True)
            values = self.baseline.values[name][segment.pair, reads.column[read]]
            edits.setdefault(name, []).append((Index(read, (slice(0, 1),)), values[:, None]))
        return edits


class _Plans:
    """The plans of a pass, in which ever more rows run: one for each number of rows."""

    def __init__(self, packing: Packing, device: torch.device) -> None:
        self._packing, self._device = packing, device
        self._whole = None if packing.is_plain else packing.make_plan()
        self._made: dict[int, TokenPlan] = {}

    def of(self, n_rows: int) -> TokenPlan:
        """The plan of the first rows."""
        if n_rows not in self._made:
            self._made[n_rows] = self._make(n_rows)
        return self._made[n_rows]

    def _make(self, n_rows: int) -> TokenPlan:
        if self._whole is not None:
            return self._whole.first_rows(n_rows)
        packing = self._packing
        return TokenPlan(batch=n_rows, n_new=packing.width, device=self._device, n_past=packing.n_past)


class _PutIn:
    """A hook that writes values into an activation."""

    def __init__(self, edits: list[tuple[Index, Tensor]]) -> None:
        self._edits = edits

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        """Write, in place: the tensor is the pass's own."""
        for index, values in self._edits:
            tensor[(index.rows, *index.rest)] = values
