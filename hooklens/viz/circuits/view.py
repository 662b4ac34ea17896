"""A circuit: nodes by layer, the embeddings at the bottom and the logits on top, joined by edges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hooklens.arguments import read_int, reads
from hooklens.display.blocks import note
from hooklens.display.elements import Child, Element, data, element
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError, join_names
from hooklens.optional import import_package
from hooklens.viz.charts import make_figure
from hooklens.viz.circuits.edges import (
    Edge,
    Level,
    ScoredGraph,
    group_sizes,
    level_of,
    make_edges,
    name_level,
    read_pairs,
)
from hooklens.viz.circuits.layout import LEFT, MOST_LABEL, NODE_HEIGHT, Layout, lay_out
from hooklens.viz.labels import for_matplotlib, readable
from hooklens.viz.scale import read_script, readout

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_MOST_TOLD = 8
_WIDTHS = (0.8, 4.5)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitView(View):
    """A circuit's nodes and edges.

    Attributes:
        edges: all of them, those with the scores furthest from 0 first.
        levels: the level of each node.
        named: the levels of nodes with names of a caller's own.
        k: how many edges are drawn.
        heading: what the view shows.
    """

    edges: tuple[Edge, ...]
    levels: Mapping[str, Level]
    named: frozenset[Level]
    k: int
    heading: str

    kind: ClassVar[str] = "circuit"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("circuit.css"))
    script: ClassVar[str] = read_script(Path(__file__).with_name("circuit.js"))

    @property
    def shown(self) -> tuple[Edge, ...]:
        """The edges that are drawn."""
        return self.edges[: self.k]

    @property
    def nodes(self) -> list[str]:
        """The nodes of the edges that are drawn, from the lowest level up."""
        found = dict.fromkeys(name for edge in self.shown for name in (edge.writer, *edge.nodes))
        return sorted(found, key=lambda node: (self.levels[node], _in_order(node)))

    @property
    def description(self) -> list[str]:
        """The sizes, and the first edges."""
        lines = [f"{len(self.nodes)} nodes, {len(self.shown):,} edges" + self._left_out()]
        return [*lines, *(f"  {_tell(edge)}" for edge in self.shown)]

    def _left_out(self) -> str:
        n_more = len(self.edges) - len(self.shown)
        return f" ({n_more:,} with scores closer to 0 are left out)" if n_more else ""

    @cached_property
    def _layout(self) -> Layout:
        return lay_out(self.shown, {node: self.levels[node] for node in self.nodes})

    @cached_property
    def _largest(self) -> float:
        return max((edge.weight for edge in self.shown), default=0.0)

    def _share(self, edge: Edge) -> float:
        """How strongly an edge is drawn, from 0 to 1."""
        return edge.weight / self._largest if self._largest else 0.5

    def _body(self) -> list[Child]:
        layout = self._layout
        names = (
            element("text", name_level(level, is_named=level in self.named), x=8, y=f"{y + 4:.5g}", class_="hl-level")
            for level, y in layout.levels.items()
        )
        # The strongest edges are drawn last, on top.
        edges = [self._draw_edge(place) for place in reversed(range(len(self.shown)))]
        drawing = element(
            "svg",
            names,
            edges,
            map(self._draw_node, self.nodes),
            viewBox=f"0 0 {layout.width:g} {layout.height:g}",
            style=f"width:{layout.width:g}px",
            class_="hl-circuit",
            role="group",
            aria_label=f"{self.title}: {self.description[0]}",
        )
        blocks: list[Child] = [
            element("h3", self.title),
            readout("Point at a node or an edge, or move among nodes with the arrow keys."),
            element("div", drawing, class_="hl-scroll"),
            data("hl-data", self._for_script()),
        ]
        if len(self.edges) > len(self.shown):
            told = f"{len(self.shown):,} of {len(self.edges):,} edges are drawn, those with the scores furthest from 0"
            blocks.append(note(f"{told}; to_dataframe() has all"))
        return blocks

    def _draw_edge(self, place: int) -> list[Element]:
        """An edge, and the broad invisible one above it that the mouse finds."""
        edge, share = self.shown[place], self._share(self.shown[place])
        paths = []
        for node in edge.nodes:
            (x0, y0), (x1, y1), (x2, y2), (x3, y3) = self._layout.curve(edge, node)
            d = f"M{x0:.5g} {y0:.5g}C{x1:.5g} {y1:.5g} {x2:.5g} {y2:.5g} {x3:.5g} {y3:.5g}"
            side = "hl-no-score" if math.isnan(edge.score) else "hl-against" if edge.score < 0 else "hl-for"
            width = _WIDTHS[0] + (_WIDTHS[1] - _WIDTHS[0]) * share
            style = f"stroke-width:{width:.3g};stroke-opacity:{0.3 + 0.6 * share:.3g}"
            paths += [
                element("path", d=d, class_=f"hl-edge {side}", style=style, data_edge=place),
                element("path", d=d, class_="hl-hit", data_edge=place),
            ]
        return paths

    def _draw_node(self, node: str) -> Element:
        x, y = self._layout.places[node]
        width = self._layout.node_width
        return element(
            "g",
            element("rect", x=-width / 2, y=-NODE_HEIGHT / 2, width=width, height=NODE_HEIGHT, rx=5),
            element("text", readable(node, MOST_LABEL), y=4, text_anchor="middle"),
            class_="hl-node",
            transform=f"translate({x:.5g} {y:.5g})",
            role="img",
            tabindex=-1,
            aria_label=self._tell_node(node),
        )

    def _tell_node(self, node: str) -> str:
        """A node with its strongest edges in words."""
        reads = [f"{readable(edge.writer)}{_aside(edge)}" for edge in self.shown if node in edge.nodes]
        writes = [f"{readable(edge.reader)}{_aside(edge, port=False)}" for edge in self.shown if edge.writer == node]
        parts = [f"{verb} {_join(listed)}" for verb, listed in (("reads", reads), ("is read by", writes)) if listed]
        return f"{readable(node)} {'; '.join(parts)}"

    def _for_script(self) -> dict[str, object]:
        place_of = {node: place for place, node in enumerate(self.nodes)}
        levels = list(self._layout.levels)
        return {
            "edges": [[place_of[edge.writer], *(place_of[node] for node in edge.nodes)] for edge in self.shown],
            "told": [_tell(edge) for edge in self.shown],
            "nodes": [[round(self._layout.places[node][0]), levels.index(self.levels[node])] for node in self.nodes],
        }

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per edge, also of those that are not drawn: `writer`, `reader`, `score`, `is_drawn`."""
        rows = [(edge.writer, edge.reader, edge.score, place < self.k) for place, edge in enumerate(self.edges)]
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            rows, columns=["writer", "reader", "score", "is_drawn"]
        )
        return table

    def to_matplotlib(self) -> "Figure":
        """The same drawing.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        layout = self._layout
        figure: Figure = make_figure(layout.width / 80, layout.height / 80 + 0.4)
        axes = figure.add_subplot()
        axes.set(xlim=(0, layout.width), ylim=(layout.height, 0), title=for_matplotlib(self.title))
        axes.set_axis_off()
        path, patches = import_package("matplotlib.path").Path, import_package("matplotlib.patches")
        for edge in reversed(self.shown):
            colour = "#c85014" if edge.score < 0 else "#2166ac" if edge.score >= 0 else "0.4"
            share = self._share(edge)
            for node in edge.nodes:
                curve = path(layout.curve(edge, node), [path.MOVETO, path.CURVE4, path.CURVE4, path.CURVE4])
                style = {"edgecolor": colour, "linewidth": 0.6 + 3 * share, "alpha": 0.3 + 0.6 * share}
                axes.add_patch(patches.PathPatch(curve, facecolor="none", **style))
        for node, (x, y) in layout.places.items():
            corner = x - layout.node_width / 2, y - NODE_HEIGHT / 2
            box = patches.FancyBboxPatch(corner, layout.node_width, NODE_HEIGHT, boxstyle="round,pad=0,rounding_size=5")
            box.set(facecolor="white", edgecolor="0.4", zorder=2)
            axes.add_patch(box)
            axes.text(x, y, readable(node, MOST_LABEL), ha="center", va="center", fontsize=8, parse_math=False)
        for level, y in layout.levels.items():
            text = name_level(level, is_named=level in self.named)
            axes.text(LEFT - 84, y, text, va="center", fontsize=8, color="0.4")
        return figure


def _in_order(node: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by size."""
    digits = "".join(letter if letter.isdigit() else " " for letter in node).split()
    return [*((int(number), "") for number in digits), (0, node)]


def _aside(edge: Edge, *, port: bool = True) -> str:
    parts = [edge.port] if port and edge.port else []
    parts += [] if math.isnan(edge.score) else [format_number(edge.score)]
    return f" ({' '.join(parts)})" if parts else ""


def _tell(edge: Edge) -> str:
    shared = f" (of {', '.join(edge.nodes)})" if len(edge.nodes) > 1 else ""
    score = "" if math.isnan(edge.score) else f": {format_number(edge.score)}"
    return f"{readable(edge.writer)} \N{RIGHTWARDS ARROW} {readable(edge.reader)}{shared}{score}"


def _join(listed: list[str]) -> str:
    more = f" and {len(listed) - _MOST_TOLD} more" if len(listed) > _MOST_TOLD else ""
    return ", ".join(listed[:_MOST_TOLD]) + more


@reads()
def circuit(
    edges: Any,
    *,
    scores: Any = None,
    layers: Mapping[str, int] | None = None,
    k: int = 100,
    group_size: int | None = None,
    title: str = "circuit",
) -> CircuitView:
    """A circuit as nodes by layer with edges by score, blue above 0 and orange below.

        hl.viz.circuit(patching.edge_attribution(model, clean, corrupted, metric), k=60)
        hl.viz.circuit(scores.circuit(40), scores=scores)

    Pointing at a node shows its edges alone, and reads out what it reads and what reads it. Edges into a head end at
    the left of its node for queries, in the middle for keys, at the right for values.

    Args:
        edges: `EdgeScores` or `ScoredEdges`, a `Circuit`, a table with columns `writer` and `reader` and perhaps
            `score`, a mapping from (writer, reader) to score, or a list of pairs, or of triples with the score.
        scores: where the scores of the edges are, in one of these forms too, if not in `edges`.
        layers: the layer of each node that is not called as those of `hooklens.patching` are (`embed`, `a3.h5`, `m3`,
            `logits`).
        k: how many edges to draw, those with the scores furthest from 0 (of edges without scores, the first).
        group_size: how many query heads share keys and values; None: as the names of all readers tell where
            `EdgeScores` are given, else 1.
        title: what the view shows.

    Raises:
        InputError: what holds no edges, nodes without a layer, edges that do not lead to a later layer, scores that
            lack an edge, or `k` below 1.
    """
    read_int(k, what="circuit: k", least=1)
    pairs = read_pairs(edges)
    if scores is not None:
        known = read_pairs(scores)
        missing = [" -> ".join(pair) for pair in pairs if pair not in known]
        if missing:
            raise InputError(f"circuit: scores lack the edges {join_names(missing, limit=10)}")
        pairs = {pair: known[pair] for pair in pairs}
    if not pairs:
        raise InputError("circuit: found no edges; expected at least one")
    if group_size is not None:
        read_int(group_size, what="circuit: group_size", least=1)
    source = next((one for one in (edges, scores) if isinstance(one, ScoredGraph)), None)
    groups = group_sizes(source.readers if source is not None else ())
    if group_size is not None:
        groups = {}
    own = dict(layers or {})
    made = make_edges(pairs, own, groups, otherwise=group_size or 1)
    made.sort(key=lambda edge: -edge.weight)
    levels = _place_nodes(made, own)
    return CircuitView(
        edges=tuple(made),
        levels=levels,
        named=frozenset(levels[node] for node in own if node in levels),
        k=k,
        heading=title,
    )


def _place_nodes(edges: list[Edge], layers: Mapping[str, int]) -> dict[str, Level]:
    """The level of every node; each edge has to lead upwards."""
    nodes = dict.fromkeys(name for edge in edges for name in (edge.writer, *edge.nodes))
    levels = {node: level_of(node, layers) for node in nodes}
    unknown = [node for node, level in levels.items() if level is None]
    if unknown:
        raise InputError(
            f"circuit: nothing tells the layer of {join_names(unknown, limit=10)}; name them: "
            f"layers={{{unknown[0]!r}: 0, ...}}"
        )
    known = {node: level for node, level in levels.items() if level is not None}
    odd = [_tell(edge) for edge in edges if any(known[node] <= known[edge.writer] for node in edge.nodes)]
    if odd:
        raise InputError(f"circuit: edges lead to later layers, and these do not: {join_names(odd, limit=10)}")
    return known
