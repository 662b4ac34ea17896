import re

import pytest
import torch

from hooklens import viz
from hooklens.errors import InputError
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit

EDGES = {
    ("embed", "a0.h0.q"): 1.0,
    ("embed", "a0.h1.v"): -0.5,
    ("a0.h0", "m0"): 0.75,
    ("a0.h1", "m0"): 2.0,
    ("m0", "logits"): 0.25,
}


def test_edges_are_drawn_by_their_scores():
    view = viz.circuit(EDGES, k=4, title="c")
    assert [edge.score for edge in view.shown] == [2.0, 1.0, 0.75, -0.5]
    html = view._repr_html_()
    # The first path is that of the weakest edge, which lies below the others.
    drawn = re.findall(r'class="hl-edge (hl-\w+)" style="stroke-width:([\d.]+)', html)
    assert [side for side, _ in drawn] == ["hl-against", "hl-for", "hl-for", "hl-for"]
    widths = [float(width) for _, width in drawn]
    assert widths == pytest.approx([0.8 + 3.7 * share for share in (0.25, 0.375, 0.5, 1.0)], abs=0.01)
    assert "4 of 5 edges are drawn" in html
    assert view.description[:2] == ["4 nodes, 4 edges (1 with scores closer to 0 are left out)", "  a0.h1 → m0: 2.00"]
    table = view.to_dataframe()
    assert table.is_drawn.tolist() == [True] * 4 + [False]
    assert table.iloc[-1].tolist()[:3] == ["m0", "logits", 0.25]


def test_levels_are_above_each_other():
    layout = viz.circuit(EDGES)._layout
    heights = [layout.places[node][1] for node in ("embed", "a0.h0", "m0", "logits")]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 4
    assert layout.places["a0.h0"][1] == layout.places["a0.h1"][1]
    # An edge begins on top of its writer and ends below its reader.
    start, _, _, end = layout.curve(viz.circuit(EDGES).edges[0], "m0")
    assert start[1] < layout.places["a0.h1"][1]
    assert end[1] > layout.places["m0"][1]


def test_neighbours_stand_near_each_other():
    """Four heads of one layer and four of the next, joined crosswise: no two edges cross where none has to."""
    pairs = {(f"a0.h{head}", f"a1.h{3 - head}.v"): 1.0 for head in range(4)}
    places = viz.circuit(pairs)._layout.places
    lower = sorted((f"a0.h{head}" for head in range(4)), key=lambda node: places[node][0])
    upper = sorted((f"a1.h{head}" for head in range(4)), key=lambda node: places[node][0])
    assert [f"a1.h{3 - int(node[-1])}" for node in lower] == upper


def test_a_circuit_takes_its_scores_from_elsewhere():
    names = ("embed", "a0.h0", "a0.h1", "m0"), ("a0.h0.q", "a0.h1.v", "m0", "logits")
    scores = torch.zeros(4, 4)
    for (writer, reader), score in EDGES.items():
        scores[names[0].index(writer), names[1].index(reader)] = score
    scored = ScoredEdges(scores=scores, writers=names[0], readers=names[1], exists=scores != 0)
    view = viz.circuit(Circuit(list(EDGES)[:3]), scores=scored)
    assert {(edge.writer, edge.reader): edge.score for edge in view.edges} == dict(list(EDGES.items())[:3])
    with pytest.raises(InputError, match="scores lack the edges 'embed -> m0'"):
        viz.circuit(Circuit([("embed", "m0")]), scores=scored)
    assert "hl-no-score" in viz.circuit(Circuit(EDGES))._repr_html_()


def test_nodes_with_names_of_ones_own():
    view = viz.circuit([("latent <1>", "latent 2", 1.0)], layers={"latent <1>": 0, "latent 2": 5})
    html = view._repr_html_()
    assert ">latent &lt;1&gt;</text>" in html
    assert 'aria-label="latent 2 reads latent <1&gt; (1.00)"' in html
    assert "layer 5" in html


def test_figures(tmp_path):
    figure = viz.circuit(EDGES).to_matplotlib()
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"embed", "a0.h0", "a0.h1", "m0", "logits", "MLP 0", "attention 0"} <= texts
    # Five edges and five boxes.
    assert len(figure.axes[0].patches) == 10
    viz.circuit(EDGES).save(tmp_path / "c.svg")
    assert b"<svg" in (tmp_path / "c.svg").read_bytes()


def test_what_is_no_circuit_is_refused():
    with pytest.raises(InputError, match="nothing tells the layer of 'latent 1', 'latent 2'; name them"):
        viz.circuit([("latent 1", "latent 2")])
    with pytest.raises(InputError, match="edges lead to later layers, and these do not: 'm1 → m0'"):
        viz.circuit([("m1", "m0")])
    with pytest.raises(InputError, match="found no edges"):
        viz.circuit([])
    with pytest.raises(InputError, match="circuit: k"):
        viz.circuit(EDGES, k=0)
