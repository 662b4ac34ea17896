import pytest
import torch

from hooklens.patching.graph.nodes import Graph, list_edges
from hooklens.patching.learned.level import GateLayout
from tests.model.networks import make_config

GRAPH = Graph.of(make_config())


def test_every_edge_has_a_gate():
    layout = GateLayout.of(GRAPH, "edge")
    assert len(layout) == len(list_edges(make_config()))
    values = torch.arange(len(layout)) + 1.0
    table = layout.spread(values, closed=-1.0)
    assert table[~GRAPH.exists()].unique().tolist() == [-1.0]
    assert torch.equal(table[GRAPH.exists()], values)
    assert torch.equal(layout.gather(table), values)


def test_a_nodes_gate_is_on_all_edges_that_lead_away_from_it():
    layout = GateLayout.of(GRAPH, "node")
    assert len(layout) == len(GRAPH.writers) - 1
    values = torch.arange(len(layout)) + 2.0
    table = layout.spread(values, closed=0.0, fixed=9.0)
    for reader, n_inputs in enumerate(GRAPH.n_inputs):
        expected = [9.0, *values.tolist()][:n_inputs]
        assert table[reader].tolist() == pytest.approx(expected + [0.0] * (len(GRAPH.writers) - n_inputs))
    assert torch.equal(layout.gather(table), values)
