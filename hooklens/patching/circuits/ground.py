"""The ground of masked runs: some pairs' unpatched runs, and what every writer writes in them and when ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.circuits.ablation import Ablation, ablated_outputs, written_names
from hooklens.patching.graph.nodes import Graph, Reader, Writer
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.metrics.metric import Ends, Metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.acting import GroupEdits, Places
from hooklens.patching.runs.baseline import run_baseline
from hooklens.patching.runs.edits import NO_EDITS, RunEdits


@dataclass(kw_only=True)
class Ground:
    """What the masked runs of some pairs go on from. `pos` are the columns that are run.

    Attributes:
        graph: the network's nodes.
        pairs: which pairs of the experiment these are.
        lengths: tokens of each.
        metrics: the metrics, prepared for them.
        ends: the values of each in the clean and the corrupted run.
        edits: what acts in every run; None: nothing does.
        first: the first column that is run.
        reads: the places that the metric reads, `first` being 0.
        ablated: every writer's ablated output.
        changes: every writer's output in the run of the circuit `reference`, minus `ablated`.
        reference: a circuit that the circuits to run are parts of; at first all edges.
        bases: by the name of the hook point at which a reader reads, its input with all writers ablated.
        mask: real columns.
        past: keys and values of the columns before `first`, layer by layer; empty where there are none.
    """

    graph: Graph
    pairs: tuple[int, ...]
    lengths: tuple[int, ...]
    metrics: MetricGroup
    ends: list[Ends]
    edits: GroupEdits | None
    first: int
    reads: Int[Tensor, "pair read"]
    ablated: Float[Tensor, "writer pair pos d_model"]
    changes: Float[Tensor, "writer pair pos d_model"]
    reference: Bool[Tensor, "reader writer"]
    bases: dict[str, Float[Tensor, "pair pos d_model"]]
    mask: Bool[Tensor, "pair pos"]
    past: list[tuple[Tensor, Tensor]]

    @property
    def metric(self) -> Metric:
        """The metric, prepared for these pairs; of several the first."""
        return next(iter(self.metrics.metrics.values()))

    @property
    def clean(self) -> Float[Tensor, " pair"]:
        """The metric's values in the clean run, of several metrics the first's."""
        return self.ends[0][0]

    @property
    def corrupted(self) -> Float[Tensor, " pair"]:
        """The same in the corrupted run."""
        return self.ends[0][1]

    @property
    def needs_whole_rows(self) -> bool:
        """Whether edits make all columns of a run depend on each other."""
        return self.edits is not None and self.edits.of_run.needs_whole_rows

    def places(self, n_circuits: int, *, at_reads: bool = False) -> Places:
        """The tokens of a batch, circuits times pairs: all columns that are run, or those that the metrics read."""
        n_pairs = len(self.pairs)
        columns = self.reads if at_reads else torch.arange(self.width, device=self.reads.device).expand(n_pairs, -1)
        pairs = torch.arange(n_pairs, device=self.reads.device)
        return Places(pairs.repeat(n_circuits), columns.repeat(n_circuits, 1) + self.first)

    @property
    def width(self) -> int:
        """Columns run."""
        return self.mask.shape[1]

    @property
    def nbytes(self) -> int:
        """What is held for every writer."""
        return self.ablated.nbytes + self.changes.nbytes


def prepare_ground(
    model: HookedCausalLM,
    prompts: PromptPairs,
    pairs: list[int],
    metric: Metric | MetricGroup,
    ablation: Ablation,
    edits: RunEdits = NO_EDITS,
) -> Ground:
    """Run both prompts of some pairs once, and ablate every writer.

    Args:
        model: the model.
        prompts: all pairs.
        pairs: the pairs to run.
        metric: what is measured; several metrics are a group.
        ablation: `"resample"`, `"zero"`, or outputs by hook name; means have to be made before.
        edits: what acts in every run.

    Raises:
        SiteError: the ablation lacks a hook point or has another shape, or the metric reads a position that is not
            there.
        MetricError: the metric is NaN or infinite for an unpatched run.
    """
    metrics = metric if isinstance(metric, MetricGroup) else MetricGroup.read(metric)
    graph = Graph.of(model.cfg)
    written = written_names(model)
    streams = list(dict.fromkeys(map(stream_name, graph.readers)))
    baseline = run_baseline(
        model, prompts, pairs, [], metrics, direction="noise", source="other", keep=[*written, *streams], edits=edits
    )
    lengths, full_width, kept = baseline.lengths, max(baseline.lengths), baseline.kept
    mask = torch.arange(full_width, device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    columns = slice(0, full_width)
    if not baseline.needs_whole_rows:
        columns = _columns_to_run(model, baseline.reads, lengths, prompts.differ(pairs, full_width), metrics, ablation)

    own: Mapping[str, Tensor] = {name: kept[name][0][:, columns] for name in written}
    others: Mapping[str, Tensor] = {name: kept[name][1][:, columns] for name in written}
    if not isinstance(ablation, str) or ablation == "zero":
        whole = {name: kept[name][0] for name in written}
        others = ablated_outputs(ablation, like=whole, pairs=pairs, prompts=prompts)
        others = {name: output[:, columns] for name, output in others.items()}
    scale = model.cfg.residual_scale
    ablated = _stack_writers(others, graph.writers, scale)
    changes = _stack_writers(own, graph.writers, scale).sub_(ablated)
    return Ground(
        graph=graph,
        pairs=tuple(pairs),
        lengths=lengths,
        metrics=baseline.metrics,
        ends=baseline.ends,
        edits=baseline.edits,
        first=columns.start,
        reads=baseline.reads - columns.start,
        ablated=ablated,
        changes=changes,
        reference=graph.exists(),
        bases=_ablate_streams(graph, {name: kept[name][0][:, columns] for name in streams}, changes),
        mask=mask[:, columns],
        past=_cut_past(baseline.keys_values, columns.start),
    )


def _cut_past(keys_values: Sequence[tuple[Tensor, Tensor]], n: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first columns, so that the others can go."""
    return [(keys[:, :n].clone(), values[:, :n].clone()) for keys, values in keys_values] if n else []


def stream_name(reader: Reader) -> str:
    """The hook point where the stream that a reader reads passes once, not as a copy for each head."""
    return f"blocks.{reader.layer}.hook_resid_pre" if reader.kind in ("q", "k", "v") else reader.hook_name


def _stack_writers(
    outputs: Mapping[str, Tensor], writers: Sequence[Writer], scale: float
) -> Float[Tensor, "writer pair pos d_model"]:
    """What writers add to the stream, from outputs by hook name; those of heads are read before their factor."""
    return torch.stack(
        [
            outputs[writer.hook_name][:, :, writer.head] * scale if writer.kind == "head" else outputs[writer.hook_name]
            for writer in writers
        ]
    )


def _columns_to_run(
    model: HookedCausalLM,
    reads: Int[Tensor, "pair read"],
    lengths: Sequence[int],
    differs: Bool[Tensor, "pair pos"],
    metrics: MetricGroup,
    ablation: Ablation,
) -> slice:
    """From the first column that an ablation changes to the last that the metric reads."""
    width = differs.shape[1]
    if model.depends_on_length(width):
        return slice(0, width)
    stop = width if metrics.n_positions is None else int(reads.max()) + 1
    if ablation != "resample":
        return slice(0, stop)
    changed = differs.any(0)
    start = int(changed.int().argmax()) if bool(changed.any()) else stop - 1
    # At least the columns that are read, and a token of every pair, are run.
    return slice(min(start, int(reads.min()), min(lengths) - 1), stop)


def _ablate_streams(graph: Graph, streams: dict[str, Tensor], changes: Tensor) -> dict[str, Tensor]:
    """The streams that readers read, with every writer ablated."""
    bases: dict[str, Tensor] = {}
    taken, n_taken = torch.zeros_like(changes[0]), 0
    for reader, n_inputs in zip(graph.readers, graph.n_inputs, strict=True):
        name = stream_name(reader)
        if name not in bases:
            taken = taken + changes[n_taken:n_inputs].sum(0)
            n_taken = n_inputs
            bases[name] = streams[name] - taken
    return bases
