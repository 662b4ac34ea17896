"""How well a known circuit holds: of its answers, of its variables, and of the edges outside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.arguments import read_flag, read_int, read_seed, reads, require
from hooklens.display import Displayed, Listing, Picture, Summary
from hooklens.optional import import_package
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge
from hooklens.patching.known.circuit import KnownCircuit
from hooklens.patching.known.exchange import Exchange
from hooklens.progress import progress_bar
from hooklens.viz.charts import CROSS, Backend, draw_heatmaps
from hooklens.viz.excerpt import thumbnail

if TYPE_CHECKING:
    import pandas

_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class KnownCheck(Displayed):
    """What was found about a known circuit, all as shares of pairs.

    Attributes:
        name: of the known circuit.
        n_pairs: pairs of prompts.
        accuracy: clean and corrupted prompts that the model answers as the algorithm does.
        interchange: for each variable, clean prompts that the model answers as the algorithm does with the variable's
            value taken from the corrupted prompt (interchange intervention accuracy, Geiger et al. 2022).
        strictness: clean prompts whose answer stays when all edges outside the circuit carry what they carry on the
            corrupted prompt.
        changed: for each edge of the network, clean prompts whose answer becomes another when it alone does: of the
            circuit's edges it should be most, of the others none.
        circuit: the circuit.
    """

    name: str
    n_pairs: int
    accuracy: float
    interchange: Mapping[str, float]
    strictness: float
    changed: Mapping[Edge, float]
    circuit: Circuit

    @property
    def least_inside(self) -> float:
        """The smallest share of answers that an edge of the circuit changes; 1 for a circuit without edges."""
        return min((share for edge, share in self.changed.items() if edge in self.circuit), default=1.0)

    @property
    def most_outside(self) -> float:
        """The largest share of answers that an edge outside the circuit changes; 0 where there is none."""
        return max((share for edge, share in self.changed.items() if edge not in self.circuit), default=0.0)

    def _summary(self) -> Summary:
        ranked = sorted(self.changed.items(), key=lambda item: (item[0] not in self.circuit, -item[1]))
        return Summary(
            title=f"KnownCheck of {self.name!r} on {self.n_pairs:,} pairs",
            facts={
                "accuracy": f"{self.accuracy:.3f}",
                "interchange accuracy": ", ".join(f"{name} {share:.3f}" for name, share in self.interchange.items()),
                "strictness": f"{self.strictness:.3f} of answers stay with all "
                f"{len(self.changed) - len(self.circuit):,} other edges exchanged",
                "answers that an edge changes": f"at least {self.least_inside:.3f} in the circuit, at most "
                f"{self.most_outside:.3f} outside",
            },
            listing=Listing(
                columns=("writer", "reader", "in circuit", "changed"),
                rows=[(*edge, edge in self.circuit, float(share)) for edge, share in ranked[:_SHOWN]],
                what="edges",
                n_rows=len(ranked),
            ),
            pages=[self._draw_small],
        )

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """A heatmap of the shares of answers that edges change, writers by readers, with a cross on the circuit's.

        Args:
            backend: the package that draws.
            title: what stands above; None: what is shown.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        writers, readers, shares, marks = self._table()
        heading = f"{self.name}: answers changed by one edge; {CROSS}: in the circuit" if title is None else title
        rows, columns = ("writer", writers), ("reader", readers)
        return draw_heatmaps(shares, rows, columns, [""], backend=backend, title=heading, marks=marks)

    def _draw_small(self) -> Picture:
        writers, readers, shares, _ = self._table()
        return thumbnail(
            shares,
            rows=("writer", writers),
            columns=("reader", readers),
            title=f"{self.name}: answers changed by one edge",
            scale="amount",
        )

    def _table(self) -> tuple[list[str], list[str], Tensor, Tensor]:
        """Writers, readers, the shares `[1 writer reader]`, NaN where there is no edge, and which are the circuit's."""
        writers, readers = (list(dict.fromkeys(edge[side] for edge in self.changed)) for side in (0, 1))
        shares = torch.full((1, len(writers), len(readers)), torch.nan, dtype=torch.float64)
        marks = torch.zeros(shares.shape, dtype=torch.bool)
        for edge, share in self.changed.items():
            place = 0, writers.index(edge[0]), readers.index(edge[1])
            shares[place], marks[place] = share, edge in self.circuit
        return writers, readers, shares, marks

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per edge: writer, reader, whether the circuit has it, the share of answers that it changes."""
        rows = [(*edge, edge in self.circuit, share) for edge, share in self.changed.items()]
        columns = ["writer", "reader", "in_circuit", "changed"]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
        return table


@reads(
    known=partial(require, kind=KnownCircuit, expected="a KnownCircuit"),
    n=partial(read_int, least=1),
    seed=read_seed,
    progress=read_flag,
)
@torch.no_grad()
def check(known: KnownCircuit, *, n: int = 256, seed: int = 1, progress: bool = False) -> KnownCheck:
    """Measure how well a known circuit holds, by a forward for each variable and each edge.

    Args:
        known: the circuit.
        n: pairs of prompts, as `known.pairs` draws them.
        seed: draws them.
        progress: show a progress bar.

    Raises:
        InputError: no known circuit, or no number of pairs; or heads of the model do not add to the stream one by one.
    """
    model, cfg = known.model, known.model.cfg
    tokens, others = known.prompts(n, seed=seed)
    exchange = Exchange(model, known.variables)
    source, plain = exchange.take(others), exchange.take(tokens)
    answers = plain.logits.argmax(-1)
    right = [_share(answers == known.answer(tokens)), _share(source.logits.argmax(-1) == known.answer(others))]
    everywhere = torch.ones(n, dtype=torch.bool, device=model.device)
    interchange = {}
    for name, variable in known.variables.items():
        found = exchange.run(tokens, source, exchanged={name: everywhere}).argmax(-1)
        interchange[name] = _share(found == known.answer(tokens, {name: variable.value(others)}))

    def run(circuit: Circuit) -> Tensor:
        edges = circuit.to_mask(cfg).to(model.device).expand(n, -1, -1)
        return exchange.run(tokens, source, edges).argmax(-1)

    full = Circuit.full(cfg)
    with progress_bar("edges", full, unit="edge", progress=progress) as bar:
        changed = {edge: _share(run(Circuit([edge])) != answers) for edge in bar}
    return KnownCheck(
        name=known.name,
        n_pairs=n,
        accuracy=sum(right) / 2,
        interchange=MappingProxyType(interchange),
        strictness=_share(run(full - known.circuit) == answers),
        changed=MappingProxyType(changed),
        circuit=known.circuit,
    )


def _share(is_so: Tensor) -> float:
    return float(is_so.double().mean())
