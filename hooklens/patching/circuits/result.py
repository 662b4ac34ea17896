"""What circuits keep of a behaviour: a metric for each circuit and pair, and faithfulness as two papers define it.

With `m` averaged over pairs, `C` the circuit, `M` the whole network and `empty` the run with every edge ablated,

- `faithfulness_hanna` is `(m(C) - m(empty)) / (m(M) - m(empty))`, and 1 where the circuit does what the network does
  (Hanna et al. 2024, "Have Faith in Faithfulness");
- `faithfulness_wang` is `abs(m(M) - m(C))`, and 0 there; in the metric's units (Wang et al. 2022, "Interpretability in
  the Wild").

Both average before they compare, so what some pairs lose and others gain cancels; `per_pair` shows where it does.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_one_of
from hooklens.display import Listing, Summary, format_number
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.results.file import LABELS, TEXT, Expectation, Expected, ResultFile, expect_numbers_of, is_list
from hooklens.patching.results.over_pairs import Compute, Mark, OverPairs, Statistic
from hooklens.patching.results.result import SweepStats
from hooklens.patching.results.statistics import Interval, Method, bootstrap_interval, bootstrap_ratio_interval
from hooklens.viz.charts import CROSS, Backend, draw_heatmaps

if TYPE_CHECKING:
    import pandas

_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AblationResult(OverPairs):
    """Values of a metric for circuits of whatever kind, all that they do not hold ablated.

    Attributes:
        labels: what each is called.
        per_pair: the metric of every circuit and pair; NaN where it was not run.
        full_per_pair: the metric of the whole network, which is the clean run.
        empty_per_pair: the metric with everything ablated that circuits can hold.
        metric: the metric's name.
        ablation: what is ablated is put in its place: `"resample"`, `"mean"`, `"zero"`, or `"given"` tensors.
        stats: what it took; circuits count as its cells.
    """

    labels: tuple[int | str, ...]
    per_pair: Float[Tensor, "circuit pair"]
    full_per_pair: Float[Tensor, " pair"]
    empty_per_pair: Float[Tensor, " pair"]
    metric: str
    ablation: str
    stats: SweepStats

    @property
    def axes(self) -> dict[str, tuple[int | str, ...]]:
        """The axis of the values, and its labels."""
        return {"circuit": self.labels}

    @property
    def values(self) -> Float[Tensor, " circuit"]:
        """The metric of each circuit, averaged over pairs."""
        return self.per_pair.mean(-1)

    @property
    def full(self) -> float:
        """The metric of the whole network, averaged over pairs."""
        return float(self.full_per_pair.mean())

    @property
    def empty(self) -> float:
        """The metric with every edge ablated, averaged over pairs."""
        return float(self.empty_per_pair.mean())

    @property
    def standard_errors(self) -> Float[Tensor, " circuit"]:
        """Standard errors of `values`, from the spread of pairs; NaN for a single pair."""
        return _standard_errors(self.per_pair)

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        return compute(self.per_pair, self.full_per_pair)

    @property
    def faithfulness_hanna(self) -> Float[Tensor, " circuit"]:
        """`(m(C) - m(empty)) / (m(M) - m(empty))`: 1 does what the network does, 0 no more than nothing.

        It is no share of something conserved: circuits without the parts that work against a behaviour lie above 1,
        circuits without those that balance them below 0.

        Raises:
            HookLensError: the network and the empty circuit have the same value.
        """
        return (self.values - self.empty) / self._span()

    @property
    def faithfulness_hanna_errors(self) -> Float[Tensor, " circuit"]:
        """Standard errors of `faithfulness_hanna`, a ratio of means, to first order; NaN for a single pair.

        Raises:
            HookLensError: as there.
        """
        kept, whole = self.per_pair - self.empty_per_pair, self.full_per_pair - self.empty_per_pair
        return _standard_errors((kept - self.faithfulness_hanna[:, None] * whole) / self._span())

    @property
    def faithfulness_wang(self) -> Float[Tensor, " circuit"]:
        """`abs(m(M) - m(C))`: 0 does what the network does; in the metric's units."""
        return (self.full - self.values).abs()

    def bootstrap_faithfulness(
        self,
        definition: Literal["hanna", "wang"] = "hanna",
        *,
        confidence: float = 0.95,
        n_resamples: int = 9999,
        method: Method = "BCa",
        seed: int = 0,
    ) -> Interval:
        """Bootstrap intervals of the faithfulness of each circuit, all values of a pair drawn together.

        That of Hanna's is of a ratio of means. Wang's is an absolute value: its interval is what that makes of the
        interval of the difference, so it begins at 0 where that holds 0.

        Args:
            definition: whose faithfulness.
            confidence, n_resamples, method, seed: as for `bootstrap`.

        Raises:
            HookLensError: fewer than two pairs, an unknown definition, or no scale, see `faithfulness_hanna`.
            MissingDependencyError: scipy, the extra `stats`, is not installed.
        """
        read_one_of(
            definition, what="bootstrap_faithfulness: definition", options=("hanna", "wang"), error=HookLensError
        )
        options: dict[str, Any] = {
            "confidence": confidence,
            "n_resamples": n_resamples,
            "method": method,
            "seed": seed,
        }
        if definition == "hanna":
            self._span()
            kept, whole = self.per_pair - self.empty_per_pair, self.full_per_pair - self.empty_per_pair
            return bootstrap_ratio_interval(kept, whole, **options)
        low, high = bootstrap_interval(self.full_per_pair - self.per_pair, **options)
        far = torch.maximum(low.abs(), high.abs())
        near = torch.minimum(low.abs(), high.abs()).masked_fill((low < 0) & (high > 0), 0.0)
        return Interval(near, far)

    @property
    def normalized(self) -> Float[Tensor, " circuit"]:
        """The values with 0 at the empty circuit and 1 at the whole network, which is `faithfulness_hanna`."""
        return self.faithfulness_hanna

    def _span(self) -> float:
        if self.full == self.empty:
            raise HookLensError(
                f"the whole network and the empty circuit have the same {self.metric}, {self.full}: there is no scale "
                "between them; faithfulness_wang needs none"
            )
        return self.full - self.empty

    def _columns(self, statistics: Sequence[Statistic]) -> dict[str, object]:
        """The columns of a table behind those that say what circuits are.

        Raises:
            HookLensError, MissingDependencyError: as for `to_dataframe` of the results.
        """
        more = self._columns_of([one for one in self._read_statistics(statistics) if one != "standard_error"])
        columns: dict[str, object] = {
            "value": self.values.tolist(),
            "standard_error": self.standard_errors.tolist(),
        }
        if self.full != self.empty:
            columns["faithfulness_hanna"] = self.faithfulness_hanna.tolist()
            columns["faithfulness_hanna_error"] = self.faithfulness_hanna_errors.tolist()
        columns["faithfulness_wang"] = self.faithfulness_wang.tolist()
        for definition in ("hanna", "wang") if "low" in more else ():
            if f"faithfulness_{definition}" in columns:
                ends = self.bootstrap_faithfulness(definition)
                columns |= {f"faithfulness_{definition}_{end}": found.tolist() for end, found in ends._asdict().items()}
        columns |= {name: found.tolist() for name, found in more.items()}
        return columns

    def _summary(self) -> Summary:
        n_circuits, n_pairs = self.per_pair.shape
        values = {"value": self.values, "standard_error": self.standard_errors}
        if self.full != self.empty:
            values["faithfulness_hanna"] = self.faithfulness_hanna
        values["faithfulness_wang"] = self.faithfulness_wang
        names, sizes = self._sizes()
        columns = [found[:_SHOWN].tolist() for found in values.values()]
        return Summary(
            title=(
                f"{type(self).__name__}: {self.metric} of {_count(n_circuits, 'circuit')} on "
                f"{_count(n_pairs, 'pair')}, {self.ablation} ablation"
            ),
            facts={
                "whole network": format_number(self.full),
                "all ablated": format_number(self.empty),
                "took": f"{self.stats.forwards:,} forwards and {format_number(self.stats.tokens)} tokens",
            },
            listing=Listing(
                columns=("circuit", *names, *values),
                rows=[
                    (str(label), *sizes[row], *(column[row] for column in columns))
                    for row, label in enumerate(self.labels[:_SHOWN])
                ],
                what="circuits",
                n_rows=n_circuits,
            ),
        )

    def _sizes(self) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
        """What tells how large circuits are: names of columns, and a row for each circuit."""
        return (), [()] * len(self.labels)

    def plot(self, *, backend: Backend = "plotly", title: str | None = None, mark: Mark | None = None) -> Any:
        """`faithfulness_hanna` of each circuit as a row of colours.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric and whose faithfulness.
            mark: put a cross on the circuits that cannot be told from the whole network: the 95 % bootstrap interval
                of the difference holds 0, or the p-value of the permutation test is above 0.05.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend or mark, no scale, see `faithfulness_hanna`, or marks of one pair.
        """
        values = self.faithfulness_hanna.detach().cpu().double()[None, None]
        columns = ("circuit", [str(label) for label in self.labels])
        heading = f"{self.metric}: faithfulness (Hanna et al. 2024)" if title is None else title
        marks = None
        if mark is not None:
            marks = self._find_unclear(mark).cpu()[None, None]
            heading += "" if title is not None else f"; {CROSS}: not told from the network ({mark.replace('_', ' ')})"
        return draw_heatmaps(values, ("", [""]), columns, [""], backend=backend, title=heading, marks=marks)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CircuitResult(AblationResult):
    """Values of a metric for circuits, everything outside them ablated.

    Attributes:
        circuits: what was run.
    """

    circuits: tuple[Circuit, ...]

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per circuit: edges, heads, value, its standard error, and faithfulness by both definitions.

        Columns of Hanna's are left out where the network and the empty circuit have the same value.

        Args:
            statistics: what else to give: `"bootstrap"`, the ends `"low"` and `"high"` of the intervals of the value
                and of both faithfulnesses (`"faithfulness_hanna_low"`, ...); `"permutation_test"`, the `"p_value"` of
                "the circuit does what the network does". `bootstrap`, `bootstrap_faithfulness` and
                `permutation_test` take options of their own.

        Raises:
            HookLensError: an unknown statistic, or fewer than two pairs.
            MissingDependencyError: a statistic of scipy, which is not installed.
        """
        columns: dict[str, object] = {
            "circuit": self.labels,
            "edges": [len(circuit) for circuit in self.circuits],
            "heads": [len(circuit.heads()) for circuit in self.circuits],
        }
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns | self._columns(statistics))
        return table

    def _sizes(self) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
        return ("edges", "heads"), [(len(one), len(one.heads())) for one in self.circuits[:_SHOWN]]

    def take(self, rows: Sequence[int], *, labels: Iterable[int | str] | None = None) -> "CircuitResult":
        """Some of the circuits, in an order, with labels of their own or those that they have; `stats` stay."""
        return replace(
            self,
            circuits=tuple(self.circuits[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows) if labels is None else tuple(labels),
            per_pair=self.per_pair[list(rows)],
        )

    def followed_by(self, other: "CircuitResult") -> "CircuitResult":
        """The circuits of this result, and behind them those of another of the same run."""
        return replace(
            self,
            circuits=self.circuits + other.circuits,
            labels=self.labels + other.labels,
            per_pair=torch.cat([self.per_pair, other.per_pair]),
        )

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        described = {
            "labels": self.labels,
            "circuits": [circuit.edges for circuit in self.circuits],
            "metric": self.metric,
            "ablation": self.ablation,
            "stats": asdict(self.stats),
        }
        _FILE.write(path, {name: getattr(self, name) for name in _TENSORS}, described)

    @classmethod
    def load(cls, path: str | Path) -> "CircuitResult":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no circuits' values; what is wrong in it is named.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        labels, listed = tuple(described["labels"]), described["circuits"]
        if len(listed) != len(labels):
            raise _FILE.damage(path, [f"key 'circuits' has {len(listed)} entries, there are {len(labels)} labels"])
        try:
            circuits = tuple(Circuit(tuple(edge) for edge in edges) for edges in listed)
        except SiteError as error:
            raise _FILE.damage(path, [f"key 'circuits' holds something else than edges ({error})"]) from error
        return cls(
            circuits=circuits,
            labels=labels,
            metric=described["metric"],
            ablation=described["ablation"],
            stats=SweepStats(**described["stats"]),
            **tensors,
        )


_TENSORS = ("per_pair", "full_per_pair", "empty_per_pair")
_FILE = ResultFile(
    format="hooklens.patching.circuits-1",
    contents="circuits' values",
    writer="CircuitResult.save",
    keys={
        "labels": LABELS,
        "circuits": Expected(
            "a list of lists of edges", lambda found: is_list(found, lambda edges: is_list(edges, _is_edge))
        ),
        "metric": TEXT,
        "ablation": TEXT,
        "stats": expect_numbers_of(SweepStats),
    },
)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _is_edge(found: Any) -> bool:
    return is_list(found, TEXT.holds) and len(found) == 2


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    shapes: tuple[tuple[int | str, ...], ...] = ((len(described["labels"]), "pair"), ("pair",), ("pair",))
    return {name: Expectation(shape) for name, shape in zip(_TENSORS, shapes, strict=True)}


def _standard_errors(per_pair: Float[Tensor, "circuit pair"]) -> Float[Tensor, " circuit"]:
    n_pairs = per_pair.shape[-1]
    if n_pairs < 2:
        return torch.full_like(per_pair[..., 0], torch.nan)
    return per_pair.std(-1) / math.sqrt(n_pairs)
