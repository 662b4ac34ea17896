"""Stability: whether a discovery finds the same circuit on other prompts, and with another seed.

Miller et al. 2024 ("Transformer Circuit Faithfulness Metrics Are Not Robust") and Nikankin et al. 2025 find that it
often does not. A discovery is repeated on random parts of the pairs, each with a seed of its own; the circuits of two
runs are compared by the Jaccard index (edges in both over edges in either), their scores by Spearman's rank
correlation of absolute values.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_function, read_int, read_number, read_seed, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Picture, Summary
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package
from hooklens.patching.choices.choice import EdgeChoice
from hooklens.patching.choices.recovery import overlap, rank_correlation
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.errors import SiteError
from hooklens.patching.estimates.edges import edge_attribution
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.pairs.template import Pair
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.file import Expectation, Expected, ResultFile, is_list
from hooklens.patching.runs.options import refuse_missing
from hooklens.patching.studies.split import draw_rows, read_share, take_metric, take_pairs
from hooklens.progress import progress_bar
from hooklens.viz.charts import Backend, draw_heatmaps
from hooklens.viz.excerpt import thumbnail

if TYPE_CHECKING:
    import pandas

_SHOWN = 100

Found = Circuit | EdgeScores | ScoredEdges
Discover = Callable[[list[Pair], Metric, int], Found]
"""From pairs, the metric for them, and a seed to a circuit, or to scores that one is chosen from."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Stability(Displayed):
    """What a discovery found in each of several runs.

    Attributes:
        circuits: one for each run.
        rows: the pairs of each run.
        seeds: the seed of each run.
        rank_correlations: `[run run]`, of scores; None: the discovery gives circuits alone.
    """

    circuits: tuple[Circuit, ...]
    rows: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    rank_correlations: Float[Tensor, "run run"] | None = None

    @property
    def overlaps(self) -> Float[Tensor, "run run"]:
        """The Jaccard indices of circuits, 1 on the diagonal."""
        table = [[overlap(one, other) for other in self.circuits] for one in self.circuits]
        return torch.tensor(table, dtype=torch.float64)

    @property
    def overlap(self) -> float:
        """The mean Jaccard index of two different runs."""
        return _mean_of_pairs(self.overlaps)

    @property
    def rank_correlation(self) -> float:
        """The mean rank correlation of two different runs.

        Raises:
            HookLensError: the discovery gives circuits alone.
        """
        if self.rank_correlations is None:
            raise HookLensError("the discovery gave circuits alone, and these have no ranks; overlap compares them")
        return _mean_of_pairs(self.rank_correlations)

    def frequencies(self) -> dict[Edge, float]:
        """In what part of the runs each edge was found, the most frequent first."""
        counted = Counter(edge for circuit in self.circuits for edge in circuit)
        return {edge: count / len(self.circuits) for edge, count in counted.most_common()}

    def consensus(self, share: float = 1.0) -> Circuit:
        """The edges found in at least this part of the runs; it may be connected no more.

        Raises:
            HookLensError: no number above 0 and at most 1.
        """
        least = read_number(
            share,
            what="consensus: share",
            expected="a number above 0 and at most 1",
            allows=lambda number: 0 < number <= 1,
            error=HookLensError,
        )
        return Circuit(edge for edge, found in self.frequencies().items() if found >= least)

    def _summary(self) -> Summary:
        sizes = sorted({len(circuit) for circuit in self.circuits})
        ranks = "" if self.rank_correlations is None else f", rank correlation {self.rank_correlation:.3f}"
        found = self.frequencies()
        return Summary(
            title=(
                f"Stability({len(self.circuits)} runs on {len(self.rows[0])} pairs each, circuits of {sizes[0]} to "
                f"{sizes[-1]} edges, overlap {self.overlap:.3f}{ranks})"
            ),
            listing=Listing(
                columns=("writer", "reader", "share of runs"),
                rows=[(*edge, share) for edge, share in list(found.items())[:_SHOWN]],
                what="edges",
                caption="edges by the share of runs that found them",
                n_rows=len(found),
            ),
            pages=[self._draw_small],
        )

    def _draw_small(self) -> Picture:
        runs = ("run", range(len(self.circuits)))
        return thumbnail(
            self.overlaps[None], rows=runs, columns=runs, title="overlap of circuits (Jaccard index)", scale="amount"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per two runs: which, their overlap, and where there are scores their rank correlation."""
        overlaps, ranks = self.overlaps.tolist(), self.rank_correlations
        rows = [
            {"run": one, "other": other, "overlap": overlaps[one][other]}
            | ({} if ranks is None else {"rank_correlation": float(ranks[one, other])})
            for one in range(len(self.circuits))
            for other in range(one + 1, len(self.circuits))
        ]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """Heatmaps, run by run: overlap, and rank correlation where there are scores.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        panels = {"overlap (Jaccard)": self.overlaps}
        if self.rank_correlations is not None:
            panels["rank correlation (Spearman)"] = self.rank_correlations.cpu().double()
        runs = [str(run) for run in range(len(self.circuits))]
        heading = "Stability of the discovery" if title is None else title
        values = torch.stack(list(panels.values()))
        return draw_heatmaps(values, ("run", runs), ("run", runs), list(panels), backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        described = {
            "circuits": [circuit.edges for circuit in self.circuits],
            "rows": self.rows,
            "seeds": self.seeds,
        }
        ranks = {} if self.rank_correlations is None else {"rank_correlations": self.rank_correlations}
        # A file holds at least one tensor.
        _FILE.write(path, {"overlaps": self.overlaps, **ranks}, described)

    @classmethod
    def load(cls, path: str | Path) -> "Stability":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        try:
            circuits = tuple(Circuit(tuple(edge) for edge in edges) for edges in described["circuits"])
        except SiteError as error:
            raise _FILE.damage(path, [f"key 'circuits' holds something else than edges ({error})"]) from error
        return cls(
            circuits=circuits,
            rows=tuple(map(tuple, described["rows"])),
            seeds=tuple(described["seeds"]),
            rank_correlations=tensors.get("rank_correlations"),
        )


@reads()
def stability(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    size: int | None = None,
    discover: Discover | None = None,
    n_runs: int = 8,
    fraction: float | None = 0.5,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
) -> Stability:
    """Repeat a discovery on random parts of the pairs, each run with a seed of its own.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths.
        metric: as for a sweep. Answers that it holds for each pair go with the pairs.
        size: edges of each circuit, chosen greedily, where the discovery gives scores.
        discover: from pairs, the metric for them and a seed to a circuit or to scores; None: `edge_attribution` by
            `"eap-ig-inputs"`. Such as `lambda pairs, metric, seed: discover_circuit(model, pairs, metric=metric,
            threshold=0.1).circuit`.
        n_runs: how many.
        fraction: the share of pairs of each run, drawn without replacement; None: all pairs in every run, so that
            runs differ by their seeds.
        seed: draws the pairs; run `r` is handed the seed `seed + r`.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.

    Raises:
        InputError: arguments that are none, fewer than two pairs to draw from, or a discovery that gives something
            else.
        HookLensError: as the discovery.
    """
    refuse_missing("stability", metric=metric)
    assert metric is not None
    options = _read_options(size, n_runs, fraction, seed)
    if discover is None and size is None:
        raise InputError(_NO_SIZE)
    shows = read_flag(progress, what="stability: progress")
    run = (
        _discover_by_attribution(model)
        if discover is None
        else read_function(discover, what="stability: discover", expected="a function of pairs, a metric and a seed")
    )
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    encoded, n_pairs = as_metric(metric).encode(model), len(prompts)
    generator = torch.Generator().manual_seed(options["seed"])
    drawn, found = [], []
    with progress_bar("discoveries", range(options["n_runs"]), unit="run", progress=shows) as bar:
        for number in bar:
            share = options["fraction"]
            rows = list(range(n_pairs)) if share is None else draw_rows(n_pairs, share, generator)
            drawn.append(tuple(rows))
            found.append(run(take_pairs(prompts, rows), take_metric(encoded, rows, n_pairs), options["seed"] + number))
            _check_found(found[-1], options["size"])
    tables = [one.edges if isinstance(one, EdgeScores) else one for one in found if not isinstance(one, Circuit)]
    ranks = [[rank_correlation(one, other) for other in tables] for one in tables]
    return Stability(
        circuits=tuple(_choose(one, options["size"]) for one in found),
        rows=tuple(drawn),
        seeds=tuple(options["seed"] + number for number in range(options["n_runs"])),
        rank_correlations=torch.tensor(ranks, dtype=torch.float64) if len(tables) == len(found) else None,
    )


_NO_SIZE = "stability: the discovery gives scores; say with size= how many edges a circuit has"


def _read_options(size: object, n_runs: object, fraction: object, seed: object) -> dict[str, Any]:
    return {
        "size": optional(_read_size)(size, what="stability: size"),
        "n_runs": read_int(n_runs, what="stability: n_runs", least=2),
        "fraction": optional(read_share)(fraction, what="stability: fraction"),
        "seed": read_seed(seed, what="stability: seed"),
    }


def _read_size(given: object, **options: Any) -> int:
    return read_int(given, least=1, **options)


def _discover_by_attribution(model: HookedCausalLM) -> Discover:
    def discover(pairs: list[Pair], metric: Metric, seed: int) -> EdgeScores:
        return edge_attribution(model, pairs, metric=metric, method="eap-ig-inputs", progress=False)

    return discover


def _check_found(found: object, size: int | None) -> None:
    """Refuse what a discovery gave, before others are run.

    Raises:
        InputError: it is no circuit and no scores, or scores that no size goes with.
    """
    if not isinstance(found, Circuit | EdgeScores | ScoredEdges):
        raise InputError(f"stability: the discovery gave {show(found)}; expected a Circuit, EdgeScores or ScoredEdges")
    if not isinstance(found, Circuit) and size is None:
        raise InputError(_NO_SIZE)


def _choose(found: Found, size: int | None) -> Circuit:
    if isinstance(found, Circuit):
        return found
    assert size is not None
    return found.circuit(size) if isinstance(found, EdgeScores) else EdgeChoice().circuit(found, size)


def _mean_of_pairs(table: Float[Tensor, "run run"]) -> float:
    one, other = torch.triu_indices(len(table), len(table), offset=1).unbind()
    return float(table[one, other].mean())


def _is_edges(found: Any) -> bool:
    return is_list(found, lambda edge: is_list(edge, lambda name: isinstance(name, str)) and len(edge) == 2)


def _are_rows(found: Any) -> bool:
    return is_list(found, lambda row: isinstance(row, int) and not isinstance(row, bool))


_FILE = ResultFile(
    format="hooklens.patching.stability-1",
    contents="the stability of a discovery",
    writer="Stability.save",
    keys={
        "circuits": Expected("a list of lists of edges", lambda found: is_list(found, _is_edges)),
        "rows": Expected("a list of lists of pairs' numbers", lambda found: is_list(found, _are_rows)),
        "seeds": Expected("a list of whole numbers", _are_rows),
    },
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    shape = (len(described["circuits"]),) * 2
    return {name: Expectation(shape, torch.float64) for name in ("overlaps", *(tensors.keys() & {"rank_correlations"}))}
