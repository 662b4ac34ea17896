"""Places for the nodes of a circuit: a line for each level, in which nodes stand near what they are joined to."""

from collections.abc import Sequence
from dataclasses import dataclass

from hooklens.viz.circuits.edges import Edge, Level

GAP = 10.0
DOWN = 66.0
MARGIN = 26.0
LEFT = 92.0
MOST_LABEL = 16
"""The most letters of a name that are written into its node."""

_LEAST_NODE = 52.0
_LETTER = 7.2
NODE_HEIGHT = 22.0
PORTS = {"": 0.0, "q": -14.0, "k": 0.0, "v": 14.0}
_LEAST_WIDTH = 420.0
_SWEEPS = 4


@dataclass(frozen=True)
class Layout:
    """Where nodes are.

    Attributes:
        places: the middle of each node.
        levels: the height of each level, the last one on top.
        width, height: of the whole drawing.
        node_width: of each node.
    """

    places: dict[str, tuple[float, float]]
    levels: dict[Level, float]
    width: float
    height: float
    node_width: float

    def curve(self, edge: Edge, node: str) -> tuple[tuple[float, float], ...]:
        """The four points of a Bezier curve from the top of the writer to the bottom of a reader's node."""
        x_from, y_from = self.places[edge.writer]
        x_to, y_to = self.places[node]
        start = x_from, y_from - NODE_HEIGHT / 2
        end = x_to + PORTS[edge.port], y_to + NODE_HEIGHT / 2
        bend = min(0.5 * (start[1] - end[1]), DOWN)
        return start, (start[0], start[1] - bend), (end[0], end[1] + bend), end


def lay_out(edges: Sequence[Edge], level_of: dict[str, Level]) -> Layout:
    """Places for all nodes of the edges.

    Nodes of a level are ordered by the mean place of their neighbours, by turns of those below and of those above
    (the barycentre method of Sugiyama, Tagawa and Toda 1981), which leaves few crossings.

    Args:
        edges: between the nodes.
        level_of: the level of each node.
    """
    lines: dict[Level, list[str]] = {level: [] for level in sorted(set(level_of.values()))}
    for node in level_of:
        lines[level_of[node]].append(node)
    below: dict[str, list[str]] = {node: [] for node in level_of}
    above: dict[str, list[str]] = {node: [] for node in level_of}
    for edge in edges:
        for node in edge.nodes:
            below[node].append(edge.writer)
            above[edge.writer].append(node)
    for sweep in range(_SWEEPS):
        upwards = sweep % 2 == 0
        neighbours = below if upwards else above
        at = {node: _share(place, len(line)) for line in lines.values() for place, node in enumerate(line)}
        for line in lines.values() if upwards else reversed(lines.values()):
            wanted = {
                node: sum(at[other] for other in neighbours[node]) / len(neighbours[node])
                if neighbours[node]
                else at[node]
                for node in line
            }
            line.sort(key=lambda node: wanted[node])
            at |= {node: _share(place, len(line)) for place, node in enumerate(line)}
    node_width = max(_LEAST_NODE, 10 + _LETTER * min(MOST_LABEL, max(map(len, level_of))))
    inner = max(_LEAST_WIDTH, (node_width + GAP) * max(map(len, lines.values())))
    height = 2 * MARGIN + DOWN * (len(lines) - 1)
    heights = {level: height - MARGIN - DOWN * place for place, level in enumerate(lines)}
    places = {
        node: (LEFT + inner * _share(place, len(line)), heights[level])
        for level, line in lines.items()
        for place, node in enumerate(line)
    }
    return Layout(places=places, levels=heights, width=LEFT + inner + MARGIN, height=height, node_width=node_width)


def _share(place: int, count: int) -> float:
    return (place + 0.5) / count
