"""The scores of edges, and the circuits that the strongest make up."""

import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int
from hooklens.errors import CheckpointError, join_names
from hooklens.files import read_safetensors, write_safetensors
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge, inputs_of, split_writer

if TYPE_CHECKING:
    import pandas

_FORMAT = "hooklens.patching.edge-scores-1"
_TENSORS = ("per_pair", "exists", "clean_per_pair", "corrupted_per_pair")
_DESCRIBED = ("writers", "readers", "metric", "method", "direction", "forwards", "tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeScores:
    """The score of every edge, for each pair of prompts.

    Attributes:
        per_pair: `[writer reader pair]`; 0 where there is no edge, NaN where it was not scored.
        writers, readers: the nodes, in the order in which they write and read.
        exists: `[writer reader]`, where there is an edge.
        clean_per_pair, corrupted_per_pair: the metric of the unpatched runs.
        metric: the metric's name.
        method: how edges were scored.
        direction: `"noise"`: scores are those of corrupted outputs in the clean run; `"denoise"`: the other way.
        forwards: runs of the network, those with a backward pass included.
        tokens: tokens run through all layers, or as many through some as comes to the same.
    """

    per_pair: Float[Tensor, "writer reader pair"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Bool[Tensor, "writer reader"]
    clean_per_pair: Float[Tensor, " pair"]
    corrupted_per_pair: Float[Tensor, " pair"]
    metric: str
    method: str
    direction: Literal["denoise", "noise"]
    forwards: int
    tokens: float

    @property
    def scores(self) -> Float[Tensor, "writer reader"]:
        """The scores, averaged over the pairs that were scored."""
        return self.per_pair.nanmean(-1)

    @property
    def standard_errors(self) -> Float[Tensor, "writer reader"]:
        """The standard errors of `scores`: the spread over pairs (n - 1) by the root of their number.

        NaN where fewer than two pairs were scored.
        """
        known = ~self.per_pair.isnan()
        n = known.sum(-1)
        squares = (self.per_pair - self.scores[..., None]).square().masked_fill(~known, 0.0).sum(-1)
        spread = (squares / (n - 1)).sqrt() / n.sqrt()
        return spread.masked_fill(n < 2, torch.nan)

    @property
    def clean(self) -> float:
        """The metric of the clean run, averaged over pairs."""
        return float(self.clean_per_pair.nanmean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run, averaged over pairs."""
        return float(self.corrupted_per_pair.nanmean())

    def __getitem__(self, edge: Edge) -> float:
        writer, reader = edge
        unknown = [name for name, known in ((writer, self.writers), (reader, self.readers)) if name not in known]
        if unknown:
            raise SiteError(
                f"no edge {writer!r} -> {reader!r}: {unknown} is no node here; writers are {join_names(self.writers)}, "
                f"readers {join_names(self.readers)}"
            )
        return float(self.scores[self.writers.index(writer), self.readers.index(reader)])

    def top(self, k: int) -> list[Edge]:
        """The `k` edges with the largest scores by absolute value, as (writer, reader).

        Raises:
            InputError: no number of edges.
        """
        read_int(k, what="EdgeScores.top: k", least=0)
        strength = self.scores.abs().nan_to_num(0.0).masked_fill(~self.exists, -1.0).flatten()
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
            InputError: no number of edges.
        """
        read_int(k, what="EdgeScores.circuit: k", least=0)
        return Circuit(self._choose_connected(k) if connected else self.top(k))

    def _choose_connected(self, k: int) -> list[Edge]:
        """The edges in the order in which the greedy search takes them."""
        strength = self.scores.abs().nan_to_num(0.0).tolist()
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
        """One row per edge, the strongest first: writer, reader, score, and its standard error over several pairs."""
        edges = self.top(self.exists.numel())
        rows = [self.writers.index(writer) for writer, _ in edges]
        columns = [self.readers.index(reader) for _, reader in edges]
        table: pandas.DataFrame = import_package("pandas").DataFrame(edges, columns=["writer", "reader"])
        table["score"] = self.scores[rows, columns].tolist()
        if self.per_pair.shape[-1] > 1:
            table["standard_error"] = self.standard_errors[rows, columns].tolist()
        return table

    def save(self, path: str | Path) -> None:
        """Write the scores to a safetensors file, whole or not at all."""
        described = {name: getattr(self, name) for name in _DESCRIBED}
        tensors = {name: getattr(self, name) for name in _TENSORS}
        write_safetensors(path, tensors, {"format": _FORMAT, "description": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> "EdgeScores":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no edge scores.
        """
        try:
            tensors, metadata = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read edge scores from {path}: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} holds no edge scores; write them with scores.save(path)")
        try:
            described = json.loads(metadata["description"])
            nodes = {name: tuple(map(str, described[name])) for name in ("writers", "readers")}
            found = cls(
                per_pair=tensors["per_pair"],
                exists=tensors["exists"],
                clean_per_pair=tensors["clean_per_pair"],
                corrupted_per_pair=tensors["corrupted_per_pair"],
                writers=nodes["writers"],
                readers=nodes["readers"],
                metric=str(described["metric"]),
                method=str(described["method"]),
                direction=described["direction"],
                forwards=int(described["forwards"]),
                tokens=float(described["tokens"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the edge scores in {path} are damaged: {error!r}") from error
        n_pairs = found.per_pair.shape[-1:]
        shape = (len(found.writers), len(found.readers))
        wanted = {
            "per_pair": (*shape, *n_pairs),
            "exists": shape,
            "clean_per_pair": tuple(n_pairs),
            "corrupted_per_pair": tuple(n_pairs),
        }
        wrong = [name for name, size in wanted.items() if tuple(getattr(found, name).shape) != size]
        if wrong:
            raise CheckpointError(
                f"the edge scores in {path} are damaged: {join_names(wrong)} have other shapes than "
                f"{len(found.writers)} writers, {len(found.readers)} readers and {list(n_pairs)} pairs give"
            )
        if found.direction not in ("denoise", "noise"):
            raise CheckpointError(
                f"the edge scores in {path} are damaged: direction is {found.direction!r}; expected 'denoise' or "
                "'noise'"
            )
        return found
