"""Masked runs: the clean prompts, with every edge outside a circuit ablated.

In a masked run every reader gets

    input(reader) = base(reader) + sum over the circuit's edges (w -> reader) of (out(w) - ablated(w))

with `out(w)` what the writer writes in this very run, `ablated(w)` its ablated output, and `base(reader)` the
stream that the reader would get if every writer were ablated. The full circuit gives the clean run, the empty one
the ablated run, up to rounding. What no head or MLP writes (`b_O`) stays.

How it is computed: circuits are rows of a batch. The changes `out(w) - ablated(w)` of a batch are kept as
`[circuit writer pair pos d_model]`, filled as the run goes up, and the inputs of a layer's readers are one matrix
product of them with the mask `[circuit reader writer]`. Nothing of the size `[reader writer pos d_model]` is made.

- Below the lowest reader that lacks an edge in any circuit of the batch, the run is the clean one: the batch
  enters there, and shares the changes of the layers below (`Ground.changes`).
- Under `"resample"`, columns before the first token in which two prompts differ change nothing: the batch runs
  behind them on the clean run's keys and values.
- Columns past the last one that the metric reads are not run, and only those it reads are unembedded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import HookPoint
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.patching.circuits.ablation import Ablation, ablated_outputs, written_names
from hooklens.patching.graph.nodes import Graph, Reader, Writer
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.baseline import Baseline, run_baseline, unembed

Masks = Bool[Tensor, "circuit reader writer"]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the masked runs of some pairs go on from. `pos` are the columns that are run.

    Attributes:
        graph: the network's nodes.
        pairs: which pairs of the experiment these are.
        baseline: their unpatched runs, with the metric prepared.
        first: the first column that is run.
        ablated: every writer's ablated output, `[writer pair pos d_model]`.
        changes: every writer's output in the clean run minus `ablated`.
        bases: by the name of the hook point at which a reader reads, its input with all writers ablated.
        mask: real columns, `[pair pos]`.
        past: keys and values of the columns before `first`; None: there are none.
    """

    graph: Graph
    pairs: tuple[int, ...]
    baseline: Baseline
    first: int
    ablated: Float[Tensor, "writer pair pos d_model"]
    changes: Float[Tensor, "writer pair pos d_model"]
    bases: dict[str, Float[Tensor, "pair pos d_model"]]
    mask: Bool[Tensor, "pair pos"]
    past: HookedKeyValueCache | None

    @property
    def width(self) -> int:
        """Columns run."""
        return self.mask.shape[1]


def prepare_ground(
    model: HookedCausalLM, prompts: PromptPairs, pairs: list[int], metric: Metric, ablation: Ablation
) -> Ground:
    """Run some pairs' prompts in full, and ablate every writer.

    Args:
        model: the model.
        prompts: all pairs.
        pairs: the pairs to run.
        metric: what is measured.
        ablation: `"resample"`, `"zero"`, or outputs by hook name; means have to be made before.

    Raises:
        SiteError: the ablation lacks a hook point or has another shape, or the metric reads a position that is not
            there.
    """
    baseline = run_baseline(model, prompts, pairs, [], metric, direction="noise", source="other")
    lengths, full_width = baseline.lengths, max(baseline.lengths)
    clean, corrupted = prompts.clean[pairs, :full_width], prompts.corrupted[pairs, :full_width]
    mask = torch.arange(full_width, device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    columns = _columns_to_run(model, baseline, clean, corrupted, ablation)

    graph = Graph.of(model.cfg)
    written = written_names(model)
    streams = list(dict.fromkeys(map(_stream_name, graph.readers)))
    cache = HookedKeyValueCache.init_cache(model.cfg, model.device, len(pairs), dtype=model.dtype)
    with model.capture(list(dict.fromkeys([*written, *streams]))) as own:
        model.run(clean, model.make_plan(clean, mask, None, cache), past_kv_cache=cache, unembed=False)
    like = {name: own[name] for name in written}
    others = ablated_outputs(model, corrupted, mask, ablation, like=like, pairs=pairs, prompts=prompts)
    ablated = _stack_writers(others, graph.writers)[:, :, columns]
    changes = _stack_writers(own, graph.writers)[:, :, columns] - ablated
    return Ground(
        graph=graph,
        pairs=tuple(pairs),
        baseline=baseline,
        first=columns.start,
        ablated=ablated,
        changes=changes,
        bases=_ablate_streams(graph, {name: own[name][:, columns] for name in streams}, changes),
        mask=mask[:, columns],
        past=cache.crop(columns.start).freeze() if columns.start else None,
    )


def _stack_writers(
    outputs: Mapping[str, Tensor], writers: Sequence[Writer]
) -> Float[Tensor, "writer pair pos d_model"]:
    """Outputs by hook name as one tensor."""
    return torch.stack(
        [
            outputs[writer.hook_name][:, :, writer.head] if writer.kind == "head" else outputs[writer.hook_name]
            for writer in writers
        ]
    )


def _columns_to_run(
    model: HookedCausalLM, baseline: Baseline, clean: Tensor, corrupted: Tensor, ablation: Ablation
) -> slice:
    """From the first column that an ablation changes to the last that the metric reads."""
    width = clean.shape[1]
    if model.depends_on_length(width):
        return slice(0, width)
    stop = width if baseline.metric.positions is None else int(baseline.reads.max()) + 1
    if ablation != "resample":
        return slice(0, stop)
    differing = (clean != corrupted).any(0)
    start = int(differing.int().argmax()) if bool(differing.any()) else stop - 1
    # At least the columns that are read, and a token of every pair, are run.
    return slice(min(start, int(baseline.reads.min()), min(baseline.lengths) - 1), stop)


def _stream_name(reader: Reader) -> str:
    """The hook point where the stream that a reader reads passes once, not as a copy for each head."""
    return f"blocks.{reader.layer}.hook_resid_pre" if reader.kind in ("q", "k", "v") else reader.hook_name


def _ablate_streams(graph: Graph, streams: dict[str, Tensor], changes: Tensor) -> dict[str, Tensor]:
    """The streams that readers read, with every writer ablated."""
    bases: dict[str, Tensor] = {}
    taken, n_taken = torch.zeros_like(changes[0]), 0
    for reader, n_inputs in zip(graph.readers, graph.n_inputs, strict=True):
        name = _stream_name(reader)
        if name not in bases:
            taken = taken + changes[n_taken:n_inputs].sum(0)
            n_taken = n_inputs
            bases[name] = streams[name] - taken
    return bases


class MaskedRun:
    """One batch of circuits, run on some pairs.

    Args:
        model: the model.
        ground: the pairs.
        masks: the circuits.

    Attributes:
        start: the first block that runs; `n_layers` where none has to.
    """

    def __init__(self, model: HookedCausalLM, ground: Ground, masks: Masks) -> None:
        self.model, self.ground, self.masks = model, ground, masks.to(model.device)
        self.graph = ground.graph
        self.writers, self.readers = self.graph.writers, self.graph.readers
        self.start = first_incomplete_layer(self.graph, masks)
        # The embeddings, of layer -1, write the same in every run.
        self.n_shared = sum(writer.layer < self.start for writer in self.writers)
        n_own = len(self.writers) - self.n_shared
        self.own = ground.changes.new_empty(len(masks), n_own, *ground.changes.shape[1:])

    def logits(self) -> Float[Tensor, "circuit pair read d_vocab"]:
        """The logits at the positions that the metric reads."""
        model, ground = self.model, self.ground
        n_circuits, n_layers = len(self.masks), model.cfg.n_layers
        if self.start < n_layers:
            # What enters is never read: every reader's input is put together from the changes.
            stream = next(iter(ground.bases.values())).repeat(n_circuits, 1, 1)
            past = None if ground.past is None else ground.past.select(list(range(len(ground.pairs))) * n_circuits)
            plan = model.make_plan(stream, ground.mask.repeat(n_circuits, 1), None, past)
            with model.hooks(self._hooks()):
                model.run(stream, plan, past_kv_cache=past, start_at_layer=self.start, unembed=False)
        reads = ground.baseline.reads - ground.first
        last = self._inputs([len(self.readers) - 1], reads=reads)[:, 0]
        logits = unembed(model, last.flatten(0, 1))
        return logits.view(n_circuits, len(ground.pairs), *logits.shape[1:])

    def _hooks(self) -> list[Any]:
        """Hooks that give readers their inputs and keep what writers write."""
        hooks: list[Any] = []
        for index, reader in enumerate(self.readers):
            if self.start <= reader.layer < self.model.cfg.n_layers and reader.head == 0:
                same = [i for i, other in enumerate(self.readers) if other.hook_name == reader.hook_name]
                assert same[0] == index
                hooks.append((reader.hook_name, _Give(self, same)))
        for index, writer in enumerate(self.writers[self.n_shared :]):
            if writer.head == 0:
                hooks.append((writer.hook_name, _Keep(self, index)))
        return hooks

    def _inputs(
        self, rows: list[int], *, reads: Tensor | None = None
    ) -> Float[Tensor, "circuit reader pair pos d_model"]:
        """What readers of the same hook point get, at all columns or at those in `reads` `[pair read]`."""
        reader = self.readers[rows[0]]
        n_writers = self.graph.n_inputs[rows[0]]
        n_shared = min(n_writers, self.n_shared)
        base = self.ground.bases[_stream_name(reader)]
        shared, own = self.ground.changes[:n_shared], self.own[:, : n_writers - n_shared]
        if reads is not None:
            index = reads[..., None]
            base, shared, own = (tensor.take_along_dim(_lead(index, tensor), -2) for tensor in (base, shared, own))
        masks = self.masks[:, rows, :n_writers].to(base.dtype)
        total = (masks[:, :, :n_shared].flatten(0, 1) @ shared.flatten(1)).view(len(masks), len(rows), -1)
        total += base.flatten()
        if own.shape[1]:
            total = torch.baddbmm(total, masks[:, :, n_shared:], own.flatten(2))
        return total.view(len(masks), len(rows), *base.shape)

    def give(self, rows: list[int], like: Tensor) -> Tensor:
        """The inputs of readers as their hook point wants them."""
        inputs = self._inputs(rows)
        if like.ndim == 3:
            return inputs.view(like.shape)
        return inputs.permute(0, 2, 3, 1, 4).reshape(like.shape)

    def keep(self, index: int, output: Tensor) -> None:
        """Note what a layer's heads, or its MLP, write."""
        n_circuits, first = len(self.masks), self.n_shared + index
        by_node = output[:, :, None] if output.ndim == 3 else output
        n_nodes = by_node.shape[2]
        by_node = by_node.view(n_circuits, -1, *by_node.shape[1:]).permute(0, 3, 1, 2, 4)
        torch.sub(by_node, self.ground.ablated[first : first + n_nodes], out=self.own[:, index : index + n_nodes])


class _Give:
    """A hook that gives readers their inputs."""

    def __init__(self, run: MaskedRun, rows: list[int]) -> None:
        self.run, self.rows = run, rows

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        return self.run.give(self.rows, tensor)


class _Keep:
    """A hook that notes what writers write."""

    def __init__(self, run: MaskedRun, index: int) -> None:
        self.run, self.index = run, index

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        self.run.keep(self.index, tensor)


def first_incomplete_layer(graph: Graph, masks: Masks) -> int:
    """The layer of the lowest reader that lacks an edge in one of the circuits; the logits' where none does."""
    in_all = masks.all(0).sum(1).tolist()
    incomplete = (
        reader.layer for reader, n, wanted in zip(graph.readers, in_all, graph.n_inputs, strict=True) if n < wanted
    )
    return next(incomplete, graph.readers[-1].layer)


def _lead(index: Tensor, like: Tensor) -> Tensor:
    """An index with leading axes of size 1, as many as a tensor has more."""
    return index.view(*[1] * (like.ndim - index.ndim), *index.shape)
