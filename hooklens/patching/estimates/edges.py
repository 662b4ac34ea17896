"""Edge attribution patching: what every edge between two nodes would do, estimated from one gradient.

An edge patch moves what a reader gets from one writer, and from it alone, to its value in the other run; all else
that the reader gets stays. To first order (Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit
Discovery"), with `o` the writer's output, `x` the reader's input and `m` the metric,

    score(writer, reader) = sum over positions of (o' - o) . dm/dx

`method="eap-ig"` averages `dm/dx` over runs whose embeddings lie between those of the two prompts (Hanna et al.
2024). Positive scores move the metric up when the writer's part is taken from the other run.

Scores are made layer by layer as one matrix product over positions and the stream, so memory holds the writers'
changes `[writer pos d_model]` and the readers' gradients `[reader pos d_model]`, never a product of both.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.patching.estimates.attribution import average_gradients, change_of, list_fractions
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import (
    Edge,
    Reader,
    Writer,
    check_additive,
    inputs_of,
    list_readers,
    list_writers,
    reaches,
    split_writer,
)
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import Prompt, read_pairs
from hooklens.patching.runs.baseline import Direction, run_baseline
from hooklens.patching.runs.checks import check_model

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeScores:
    """The score of every edge.

    Attributes:
        scores: `[writer reader]`, averaged over pairs; 0 where there is no edge.
        writers, readers: the nodes, in the order in which they write and read.
        exists: `[writer reader]`, where there is an edge.
        clean, corrupted: the metric of the unpatched runs, averaged over pairs.
        metric: the metric's name.
    """

    scores: Float[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Tensor
    clean: float
    corrupted: float
    metric: str

    def __getitem__(self, edge: tuple[str, str]) -> float:
        writer, reader = edge
        return float(self.scores[self.writers.index(writer), self.readers.index(reader)])

    def top(self, k: int) -> list[tuple[str, str]]:
        """The `k` edges with the largest scores by absolute value, as (writer, reader)."""
        strength = self.scores.abs().masked_fill(~self.exists, -1.0).flatten()
        order = strength.argsort(descending=True, stable=True)[: min(k, int(self.exists.sum()))].tolist()
        n_readers = len(self.readers)
        return [(self.writers[index // n_readers], self.readers[index % n_readers]) for index in order]

    def circuit(self, k: int, *, connected: bool = True) -> Circuit:
        """The circuit of the `k` strongest edges, all edges where there are no more.

        Args:
            k: how many edges.
            connected: choose greedily from the logits backwards (Hanna et al. 2024): each step takes the strongest
                edge that ends in the logits or in a head or MLP of which an edge is chosen already, so no edge leads
                nowhere. The circuit of `k` edges is part of that of `k + 1`. False: simply `top(k)`.

        Raises:
            InputError: a negative `k`.
        """
        if k < 0:
            raise InputError(f"EdgeScores.circuit: k={k}; expected a number of edges >= 0")
        return Circuit(self._choose_connected(k) if connected else self.top(k))

    def _choose_connected(self, k: int) -> list[Edge]:
        """The edges in the order in which the greedy search takes them."""
        strength = self.scores.abs().tolist()
        exists = self.exists.tolist()
        row = {name: index for index, name in enumerate(self.readers)}
        group_size = sum(name.endswith(".q") for name in self.readers) // sum(name.endswith(".k") for name in row)
        chosen: list[Edge] = []
        seen: set[str] = set()
        waiting: list[tuple[float, int, int]] = []

        def open_reader(reader: str) -> None:
            if reader not in seen:
                seen.add(reader)
                for writer in range(len(self.writers)):
                    if exists[writer][row[reader]]:
                        # Of equally strong edges the first in the table is taken, as by `top`.
                        heapq.heappush(waiting, (-strength[writer][row[reader]], writer, row[reader]))

        open_reader("logits")
        while waiting and len(chosen) < k:
            _, writer, reader = heapq.heappop(waiting)
            name = self.writers[writer]
            chosen.append((name, self.readers[reader]))
            for source in inputs_of(split_writer(name), group_size=group_size):
                open_reader(str(source))
        return chosen

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per edge: writer, reader, score; the strongest first."""
        edges = self.top(self.scores.numel())
        rows = [(writer, reader, self[writer, reader]) for writer, reader in edges]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["writer", "reader", "score"])
        return table


@torch.inference_mode(mode=False)
def edge_attribution(
    model: HookedCausalLM,
    clean: Prompt,
    corrupted: Prompt,
    metric: Metric | MetricFunction,
    *,
    method: Literal["eap", "eap-ig"] = "eap",
    steps: int = 8,
    direction: Direction = "denoise",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    allow_training: bool = False,
) -> EdgeScores:
    """Score every edge between embeddings, heads, MLPs and logits.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied.
        corrupted: as many prompts of the same lengths.
        metric: as for a sweep; it must be differentiable.
        method: `"eap"`: the gradient of the run that is patched; `"eap-ig"`: averaged on the way to the other run.
        steps: gradients averaged by `"eap-ig"`.
        direction: which run is patched.
        attention_mask: real tokens (1) of padded ids, the same for both.
        allow_training: accept a model in training mode.

    Raises:
        InputError: an unknown method, prompts that do not go together, or a norm between heads and stream.
    """
    check_model(model, allow_training=allow_training)
    check_additive(model.cfg)
    fractions = list_fractions("edge_attribution", method, ("eap", "eap-ig"), steps)
    prompts = read_pairs(model, clean, corrupted, attention_mask)
    writers, readers = list_writers(model.cfg), list_readers(model.cfg)
    written = list(dict.fromkeys(writer.hook_name for writer in writers))
    names = list(dict.fromkeys([*written, *(reader.hook_name for reader in readers)]))
    with torch.no_grad():
        baseline = run_baseline(
            model, prompts, range(len(prompts)), written, as_metric(metric), direction=direction, source="other"
        )
    gradients = average_gradients(model, prompts, baseline, names, fractions, direction=direction)
    with torch.no_grad():
        changes = {name: change_of(model, baseline, name, gradients[name][0]) for name in written}
        changes = {name: _mask_padding(change, prompts.lengths) for name, change in changes.items()}
        slopes = {name: gradients[name][1] for name in names}
        scores, exists = _score_edges(model, writers, readers, changes, slopes)
    return EdgeScores(
        scores=scores / len(prompts),
        writers=tuple(map(str, writers)),
        readers=tuple(map(str, readers)),
        exists=exists,
        clean=float(baseline.clean.mean()),
        corrupted=float(baseline.corrupted.mean()),
        metric=baseline.metric.name,
    )


def _score_edges(
    model: HookedCausalLM,
    writers: Sequence[Writer],
    readers: Sequence[Reader],
    changes: dict[str, Tensor],
    slopes: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Scores summed over pairs, and where there are edges."""
    exists = torch.tensor(
        [[reaches(writer, reader, model.cfg) for reader in readers] for writer in writers], device=model.device
    )
    scores = torch.zeros(exists.shape, dtype=model.dtype, device=model.device)
    sent = torch.stack([_of_node(changes[writer.hook_name], writer) for writer in writers])
    for kind_and_layer in dict.fromkeys((reader.kind, reader.layer) for reader in readers):
        chosen = [i for i, reader in enumerate(readers) if (reader.kind, reader.layer) == kind_and_layer]
        felt = torch.stack([_of_node(slopes[readers[i].hook_name], readers[i]) for i in chosen])
        scores[:, chosen] = sent.flatten(1) @ felt.flatten(1).T
    return scores.masked_fill(~exists, 0.0), exists


def _mask_padding(change: Tensor, lengths: Sequence[int]) -> Tensor:
    """A change with zeros at padding."""
    columns = torch.arange(change.shape[1], device=change.device)
    real = columns < torch.tensor(lengths, device=change.device)[:, None]
    return change * real.view(*real.shape, *[1] * (change.ndim - 2))


def _of_node(tensor: Tensor, node: Writer | Reader) -> Float[Tensor, "pairs pos d_model"]:
    return tensor[:, :, node.head] if tensor.ndim == 4 else tensor
