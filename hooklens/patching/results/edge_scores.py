"""The scores of edges, and the circuits that the strongest make up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int, read_seed
from hooklens.display import Listing, Picture, Summary, format_number
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.choices.choice import EdgeChoice, read_choice
from hooklens.patching.choices.recovery import edge_auroc
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.choices.stable import selection_frequency
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge
from hooklens.patching.results.file import (
    DIRECTION,
    NUMBER,
    TEXT,
    WHOLE_NUMBER,
    Expectation,
    Expected,
    ResultFile,
    is_list,
)
from hooklens.patching.results.moments import Moments
from hooklens.patching.results.over_pairs import Compute, Mark, OverPairs, Statistic
from hooklens.viz.charts import CROSS, Backend, draw_heatmaps
from hooklens.viz.excerpt import strongest, thumbnail

if TYPE_CHECKING:
    import pandas

_SHOWN = 100
_MOST_AVERAGED = 50_000_000
"""The most scores that a display averages: more than these take a second."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EdgeScores(OverPairs):
    """The score of every edge, over pairs of prompts.

    `per_pair` takes 4 bytes (8 of a float64 model) for each writer, reader and pair: 0.28 GB for 1,000 pairs on a
    network of 12 layers with 12 heads, 13 GB on one of 32 layers with 32 heads. Statistics go through it writer
    by writer, so they take no second copy. `edge_attribution(..., keep_pairs=False)` has sums in its place.

    Attributes:
        per_pair: `[writer reader pair]`; 0 where there is no edge, NaN where it was not scored. None: only sums over
            pairs were kept.
        moments: `[writer reader]`, the sums, where `per_pair` is None.
        writers, readers: the nodes, in the order in which they write and read.
        exists: `[writer reader]`, where there is an edge.
        clean_per_pair, corrupted_per_pair: the metric of the unpatched runs.
        metric: the metric's name.
        method: how edges were scored.
        rules: how the gradients behind the scores were taken, see `hooklens.patching.estimates.rules`.
        direction: `"noise"`: scores are those of corrupted outputs in the clean run; `"denoise"`: the other way.
        forwards: runs of the network, those with a backward pass included.
        tokens: tokens run through all layers, or as many through some as comes to the same.
    """

    per_pair: Float[Tensor, "writer reader pair"] | None
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
    rules: str = "gradient"
    moments: Moments | None = None

    @property
    def scores(self) -> Float[Tensor, "writer reader"]:
        """The scores, averaged over the pairs that were scored; 0 where there is no edge."""
        if self.per_pair is not None:
            return self.per_pair.nanmean(-1)
        assert self.moments is not None
        return self.moments.mean.to(self.clean_per_pair.dtype).masked_fill(~self.exists, 0.0)

    @property
    def standard_errors(self) -> Float[Tensor, "writer reader"]:
        """The standard errors of `scores`: the spread over pairs (n - 1) by the root of their number.

        NaN where fewer than two pairs were scored, and where there is no edge.
        """
        if self.per_pair is not None:
            errors = torch.stack([_standard_errors(of_writer) for of_writer in self.per_pair])
        else:
            assert self.moments is not None
            errors = self.moments.standard_errors.to(self.clean_per_pair.dtype)
        return errors.masked_fill(~self.exists, torch.nan)

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        """A statistic of each edge's score, over the pairs in which it was scored, against 0; NaN for fewer than two.

        Raises:
            HookLensError: the scores of single pairs were not kept, or no edge was scored in two of them.
        """
        if self.per_pair is None:
            raise HookLensError(
                "these edge scores hold sums over pairs, of which only means and standard errors can be told; for "
                "intervals and tests over pairs run edge_attribution with keep_pairs=True"
            )
        found: tuple[Tensor, ...] | None = None
        for writer, of_writer in enumerate(self.per_pair):
            edges = self.exists[writer].nonzero()[:, 0]
            # All edges know the same pairs, but for those of a search that was stopped.
            patterns, pattern_of = torch.unique(~of_writer[edges].isnan(), dim=0, return_inverse=True)
            for number, known in enumerate(patterns):
                if known.sum() > 1:
                    readers = edges[pattern_of == number]
                    values = of_writer[readers][:, known]
                    parts = compute(values, values.new_zeros(values.shape[1]))
                    found = found or tuple(part.new_full(self.exists.shape, torch.nan) for part in parts)
                    for whole, part in zip(found, parts, strict=True):
                        whole[writer, readers] = part
        if found is None:
            raise HookLensError("statistics need at least two pairs; no edge was scored in more than one")
        return found

    @property
    def clean(self) -> float:
        """The metric of the clean run, averaged over pairs."""
        return float(self.clean_per_pair.nanmean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run, averaged over pairs."""
        return float(self.corrupted_per_pair.nanmean())

    @property
    def edges(self) -> ScoredEdges:
        """The scores as a table that choices are made from, `contributions` where they have a sign.

        Where both unpatched runs have the same value no sign can be told, and scores stay as they are.
        """
        return self._table(self.scores * (self._sign or 1.0))

    @property
    def contributions(self) -> Float[Tensor, "writer reader"]:
        """The scores, above 0 for edges that work for the clean run's behaviour and below for those that work against.

        That is the sign of MIB's files. An edge works for the behaviour if the clean prompt's output on it moves the
        metric to the clean run's side of the corrupted run's, whether that is up (`LogitDiff`) or down (`KL`, `Loss`).

        Raises:
            HookLensError: both unpatched runs have the same value, so there are no sides.
        """
        if self._sign == 0:
            raise HookLensError(
                f"the clean and the corrupted run have the same {self.metric}, {self.clean}: no edge can work for or "
                "against what tells them apart; choose edges by absolute scores"
            )
        return self.scores * self._sign

    @property
    def _sign(self) -> float:
        """What turns scores into contributions; 0: nothing does."""
        side = self.clean - self.corrupted
        towards = float(side > 0) - float(side < 0)
        return -towards if self.direction == "noise" else towards

    def _table(self, scores: Float[Tensor, "writer reader"]) -> ScoredEdges:
        return ScoredEdges(scores=scores, writers=self.writers, readers=self.readers, exists=self.exists)

    def __getitem__(self, edge: Edge) -> float:
        return self._table(self.scores)[edge]

    def top(self, k: int) -> list[Edge]:
        """The `k` edges with the largest scores by absolute value, as (writer, reader).

        Raises:
            InputError: no number of edges.
        """
        read_int(k, what="EdgeScores.top: k", least=0)
        return self._table(self.scores).top(k)

    def circuit(self, k: int, *, connected: bool = True, choice: EdgeChoice | None = None) -> Circuit:
        """The circuit of the `k` strongest edges, all edges where there are no more.

        Args:
            k: how many edges.
            connected: choose greedily from the logits backwards (Hanna et al. 2024): each step takes the strongest
                edge that ends in the logits or in a head or MLP of which an edge is chosen already, so no edge leads
                nowhere. The circuit of `k` edges is part of that of `k + 1`. False: simply `top(k)`.
            choice: another way to choose, in place of `connected`.

        Raises:
            InputError: no number of edges, or a choice beside `connected=False`.
            HookLensError: as `EdgeChoice.circuit`, and as `contributions` where edges are chosen by them.
        """
        read_int(k, what="EdgeScores.circuit: k", least=0)
        made = read_choice(choice, connected=connected, what="EdgeScores.circuit")
        return made.circuit(self._table(self.contributions) if made.by == "signed" else self.edges, k)

    def selection_frequency(
        self, k: int, *, choice: EdgeChoice | None = None, n_draws: int = 200, seed: int = 0
    ) -> Float[Tensor, "writer reader"]:
        """How often each edge is among the `k` chosen when pairs are drawn anew, with replacement.

        Args:
            k: how many edges are chosen in each draw.
            choice: how; None: greedily by absolute scores.
            n_draws: draws of pairs.
            seed: of the draws.

        Raises:
            InputError: numbers that are none.
            HookLensError: the scores of single pairs were not kept, or there is one pair.
        """
        read_int(k, what="EdgeScores.selection_frequency: k", least=0)
        made = read_choice(choice, connected=True, what="EdgeScores.selection_frequency")
        draws = read_int(n_draws, what="EdgeScores.selection_frequency: n_draws", least=1)
        number = read_seed(seed, what="EdgeScores.selection_frequency: seed")
        edges = self._table(self.contributions) if made.by == "signed" else self.edges
        per_pair = (self._sign or 1.0) * self._kept_pairs()
        return selection_frequency(edges, per_pair, k, choice=made, n_draws=draws, seed=number)

    def stable_edges(self, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> ScoredEdges:
        """The scores of the edges whose bootstrap interval over pairs excludes 0; all others have the score 0.

        Circuits that are chosen of them, as `EdgeChoice().circuit(stable, k)`, take edges of one sign first.

        Args:
            confidence, n_resamples, seed: as for `bootstrap`, by percentiles.

        Raises:
            HookLensError: the scores of single pairs were not kept, or there is one pair.
            MissingDependencyError: scipy, the extra `stats`, is not installed.
        """
        low, high = self.bootstrap(confidence=confidence, n_resamples=n_resamples, method="percentile", seed=seed)
        one_sided = (low > 0) | (high < 0)
        edges = self.edges
        return self._table(edges.scores.masked_fill(~one_sided, 0.0))

    def auroc(self, known: Circuit) -> float:
        """How well scores tell the edges of a known circuit from others; see `edge_auroc`.

        Raises:
            HookLensError: as there.
        """
        return edge_auroc(self.edges, known)

    def _kept_pairs(self) -> Float[Tensor, "writer reader pair"]:
        if self.per_pair is None:
            raise HookLensError(
                "these edge scores hold sums over pairs, from which none can be drawn; run edge_attribution with "
                "keep_pairs=True"
            )
        if self.per_pair.shape[-1] < 2:
            raise HookLensError("drawing pairs anew needs at least two; the result has 1")
        return self.per_pair

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per edge, the strongest first: writer, reader, score, and its standard error over several pairs.

        Args:
            statistics: what else to give of each score: `"bootstrap"`, the ends `"low"` and `"high"` of its interval;
                `"permutation_test"`, the `"p_value"` of "the score is 0". Both resample the pairs for each edge, which
                for tens of thousands of edges and a thousand pairs takes hours; `bootstrap` and `permutation_test`
                take fewer resamples.

        Raises:
            HookLensError: an unknown statistic, fewer than two pairs, or scores of which only sums were kept.
            MissingDependencyError: a statistic of scipy, which is not installed.
        """
        more = self._columns_of([one for one in self._read_statistics(statistics) if one != "standard_error"])
        edges = self.top(self.exists.numel())
        rows = [self.writers.index(writer) for writer, _ in edges]
        columns = [self.readers.index(reader) for _, reader in edges]
        table: pandas.DataFrame = import_package("pandas").DataFrame(edges, columns=["writer", "reader"])
        table["score"] = self.scores[rows, columns].tolist()
        if self.clean_per_pair.numel() > 1 or "standard_error" in statistics:
            table["standard_error"] = self.standard_errors[rows, columns].tolist()
        for name, found in more.items():
            table[name] = found[rows, columns].tolist()
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None, mark: Mark | None = None) -> Any:
        """A heatmap of the scores, writers by readers; nothing is drawn where there is no edge.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric and the method.
            mark: put a cross on the edges whose score cannot be told from 0: the 95 % bootstrap interval holds 0, or
                the p-value of the permutation test is above 0.05.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend or mark, or marks without two pairs whose scores were kept.
        """
        heading = self._heading() if title is None else title
        marks = None
        if mark is not None:
            marks = (self._find_unclear(mark) & self.exists).cpu()[None]
            heading += "" if title is not None else f"; {CROSS}: not told from 0 ({mark.replace('_', ' ')})"
        values = self.scores.masked_fill(~self.exists, torch.nan).detach().cpu().double()[None]
        rows, columns = ("writer", list(self.writers)), ("reader", list(self.readers))
        return draw_heatmaps(values, rows, columns, [""], backend=backend, title=heading, marks=marks)

    def _heading(self) -> str:
        return f"{self.metric}: scores of edges ({self.method}, rules {self.rules})"

    def _summary(self) -> Summary:
        n_pairs, n_scores = self.clean_per_pair.numel(), 0 if self.per_pair is None else self.per_pair.numel()
        is_large = n_scores > _MOST_AVERAGED
        n_edges = int(self.exists.sum())
        return Summary(
            title=f"{type(self).__name__}: {self.metric}, {self.direction}, by {self.method}, rules {self.rules}",
            facts={
                "edges": f"{n_edges:,}, from {len(self.writers)} writers to {len(self.readers)} readers",
                "pairs": f"{n_pairs:,}" + ("" if self.per_pair is not None else ", of which sums were kept"),
                "unpatched": f"clean {format_number(self.clean)}, corrupted {format_number(self.corrupted)}",
                **self._more_facts(),
                "took": f"{self.forwards:,} forwards and {format_number(self.tokens)} tokens",
            },
            listing=None if is_large else self._list_strongest(n_edges),
            notes=[f"the {n_scores:,} scores are not averaged for this; to_dataframe() has all"] if is_large else [],
            pages=[] if is_large else [self._draw_small],
        )

    def _more_facts(self) -> dict[str, str]:
        """What a kind of result says besides."""
        return {}

    def _list_strongest(self, n_edges: int) -> Listing:
        scores = self.scores
        places = strongest(scores.masked_fill(~self.exists, torch.nan), min(n_edges, _SHOWN))
        rows = [divmod(place, len(self.readers)) for place in places]
        found = scores.flatten()[places].tolist()
        return Listing(
            columns=("writer", "reader", "score"),
            rows=[(self.writers[i], self.readers[j], score) for (i, j), score in zip(rows, found, strict=True)],
            what="edges",
            caption="edges with the largest scores",
            n_rows=n_edges,
        )

    def _draw_small(self) -> Picture:
        values = self.scores.masked_fill(~self.exists, torch.nan)[None]
        rows, columns = ("writer", self.writers), ("reader", self.readers)
        return thumbnail(values, rows=rows, columns=columns, title=self._heading().replace("<br>", "; "))

    def save(self, path: str | Path) -> None:
        """Write the scores to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        if self.per_pair is not None:
            tensors["per_pair"] = self.per_pair
        else:
            assert self.moments is not None
            tensors["moments"] = self.moments.table
        _FILE.write(path, tensors, {name: getattr(self, name) for name in _FILE.keys})

    @classmethod
    def load(cls, path: str | Path) -> "EdgeScores":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no edge scores.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        described.update(writers=tuple(described["writers"]), readers=tuple(described["readers"]))
        return cls(
            per_pair=tensors.get("per_pair"),
            moments=Moments(tensors["moments"]) if "moments" in tensors else None,
            exists=tensors["exists"],
            clean_per_pair=tensors["clean_per_pair"],
            corrupted_per_pair=tensors["corrupted_per_pair"],
            **described,
        )


_TENSORS = ("exists", "clean_per_pair", "corrupted_per_pair")
_NODES = Expected("a list of texts", lambda found: is_list(found, TEXT.holds))
_FILE = ResultFile(
    format="hooklens.patching.edge-scores-1",
    contents="edge scores",
    writer="EdgeScores.save",
    keys={
        "writers": _NODES,
        "readers": _NODES,
        "metric": TEXT,
        "method": TEXT,
        "rules": TEXT,
        "direction": DIRECTION,
        "forwards": WHOLE_NUMBER,
        "tokens": NUMBER,
    },
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    nodes = (len(described["writers"]), len(described["readers"]))
    if "moments" in tensors:
        scores = {"moments": Expectation((3, *nodes), torch.float64)}
    else:
        scores = {"per_pair": Expectation((*nodes, "pair"))}
    return scores | {
        "exists": Expectation(nodes, torch.bool),
        "clean_per_pair": Expectation(("pair",)),
        "corrupted_per_pair": Expectation(("pair",)),
    }


def _standard_errors(of_writer: Float[Tensor, "reader pair"]) -> Float[Tensor, " reader"]:
    """The standard errors of the means over the pairs that are known; NaN for fewer than two."""
    known = ~of_writer.isnan()
    n = known.sum(-1, dtype=of_writer.dtype)
    squares = (of_writer - of_writer.nanmean(-1, keepdim=True)).square().masked_fill(~known, 0.0).sum(-1)
    return ((squares / (n - 1)).sqrt() / n.sqrt()).masked_fill(n < 2, torch.nan)
