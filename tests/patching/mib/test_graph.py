import json
import math

import pytest
import torch

from hooklens.errors import CheckpointError, InputError
from hooklens.patching import Circuit, ScoredEdges, ScoredGraph, SiteError
from hooklens.patching.graph.nodes import list_edges
from tests.model.networks import ALL_CONFIGS, make_config

# Two layers of one head: the smallest network with every kind of edge.
CFG = make_config(n_heads=1, d_model=3, d_head=3)

# Written by hand after EAP-IG's `Graph.to_json`: nodes with scores and entries, edges with scores.
THEIRS = {
    "cfg": {"n_layers": 2, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 3},
    "nodes": {
        "input": {"in_graph": True, "score": math.nan, "neurons": [True, True, True]},
        "a0.h0": {"in_graph": True, "score": 0.5, "neurons": [True, False, False]},
        "m0": {"in_graph": False, "score": -0.25, "neurons": [False, False, False]},
        "a1.h0": {"in_graph": True, "score": 2.0, "neurons": [True, True, False]},
        "m1": {"in_graph": False, "score": 0.0, "neurons": [True, True, True]},
        "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<q>": {"score": 0.1, "in_graph": False},
        "input->a0.h0<k>": {"score": 0.2, "in_graph": False},
        "input->a0.h0<v>": {"score": 0.3, "in_graph": True},
        "input->m0": {"score": -0.4, "in_graph": False},
        "a0.h0->m0": {"score": 0.5, "in_graph": False},
        "input->a1.h0<q>": {"score": 0.6, "in_graph": False},
        "input->a1.h0<k>": {"score": 0.7, "in_graph": False},
        "input->a1.h0<v>": {"score": 0.8, "in_graph": False},
        "a0.h0->a1.h0<q>": {"score": 0.9, "in_graph": False},
        "a0.h0->a1.h0<k>": {"score": 1.0, "in_graph": True},
        "a0.h0->a1.h0<v>": {"score": 1.1, "in_graph": False},
        "m0->a1.h0<q>": {"score": 1.2, "in_graph": False},
        "m0->a1.h0<k>": {"score": 1.3, "in_graph": False},
        "m0->a1.h0<v>": {"score": 1.4, "in_graph": False},
        "input->m1": {"score": 1.5, "in_graph": False},
        "a0.h0->m1": {"score": 1.6, "in_graph": False},
        "m0->m1": {"score": 1.7, "in_graph": False},
        "a1.h0->m1": {"score": 1.8, "in_graph": False},
        "input->logits": {"score": 1.9, "in_graph": True},
        "a0.h0->logits": {"score": 2.0, "in_graph": False},
        "m0->logits": {"score": 2.1, "in_graph": False},
        "a1.h0->logits": {"score": 2.2, "in_graph": True},
        "m1->logits": {"score": 2.3, "in_graph": False},
    },
}


def write(tmp_path, content):
    path = tmp_path / "importances.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_of_theirs(tmp_path):
    found = ScoredGraph.load(write(tmp_path, THEIRS), CFG)
    assert found.edges["embed", "a0.h0.v"] == 0.3
    assert found.edges["embed", "m0"] == -0.4
    assert found.edges["a0.h0", "a1.h0.k"] == 1.0
    assert found.edges["m1", "logits"] == 2.3
    assert found.edges.n_edges == len(THEIRS["edges"])
    expected = [("embed", "a0.h0.v"), ("a0.h0", "a1.h0.k"), ("embed", "logits"), ("a1.h0", "logits")]
    assert found.circuit == Circuit(expected)
    assert found.node_scores[1:].tolist() == [0.5, -0.25, 2.0, 0.0]
    assert found.node_scores[0].isnan()
    assert found.neuron_scores is None
    assert found.neurons.sum(1).tolist() == [3, 1, 0, 2, 3]
    # Two edges of the whole embeddings, one of a third of a head, one of two thirds.
    assert found.weighted_edge_count == pytest.approx(2 + 1 / 3 + 2 / 3)


def test_what_is_written_is_what_was_read(tmp_path):
    found = ScoredGraph.load(write(tmp_path, THEIRS), CFG)
    found.save(tmp_path / "again.json", CFG)
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["edges"] == THEIRS["edges"]
    assert again["cfg"] == THEIRS["cfg"]
    assert again["nodes"]["a0.h0"] == THEIRS["nodes"]["a0.h0"]
    assert math.isnan(again["nodes"]["input"].pop("score"))
    assert again["nodes"]["input"] == {"in_graph": True, "neurons": [True, True, True]}
    assert list(again["nodes"]) == list(THEIRS["nodes"])


@pytest.mark.parametrize("network", ["grouped", "rotary", "attention only", "shared norm", "heads and MLPs apart"])
def test_round_trip(network, tmp_path):
    cfg = ALL_CONFIGS[network]
    generator = torch.Generator().manual_seed(0)
    # Thirty-seconds, so that the parts of a group's edges add up to the bit.
    draws = torch.randint(-99, 100, (len(list_edges(cfg)),), generator=generator) / 32
    edges = ScoredEdges.of(cfg, dict(zip(list_edges(cfg), draws.tolist(), strict=True)))
    n_writers = len(edges.writers)
    graph = ScoredGraph(
        edges=edges,
        circuit=Circuit(list_edges(cfg)[::3]),
        node_scores=torch.arange(float(n_writers), dtype=torch.float64),
        neuron_scores=torch.randn(n_writers, cfg.d_model, generator=generator, dtype=torch.float64),
        neurons=torch.rand(n_writers, cfg.d_model, generator=generator) < 0.5,
    )
    graph.save(tmp_path / "graph.json", cfg)
    found = ScoredGraph.load(tmp_path / "graph.json", cfg)
    assert torch.equal(found.edges.scores, edges.scores)
    assert found.circuit == graph.circuit
    for name in ("node_scores", "neuron_scores", "neurons"):
        assert torch.equal(getattr(found, name), getattr(graph, name))
    plain = ScoredGraph(edges=edges, circuit=Circuit())
    plain.save(tmp_path / "plain.json", cfg)
    assert ScoredGraph.load(tmp_path / "plain.json", cfg).neurons is None
    assert repr(plain).splitlines()[0] == f"ScoredGraph({edges.n_edges} edges, 0 in the circuit)"


def test_under_grouped_queries_a_file_has_an_edge_for_each_head(tmp_path):
    cfg = ALL_CONFIGS["grouped"]
    edges = ScoredEdges.of(cfg, {("embed", "a1.h1.k"): 4.0, ("m0", "a1.h3.q"): 1.0})
    graph = ScoredGraph(edges=edges, circuit=Circuit([("embed", "a1.h1.k"), ("m0", "a1.h3.q")]))
    # The key-value head 1 serves the heads 2 and 3.
    assert graph.weighted_edge_count == 3.0
    graph.save(tmp_path / "graph.json", cfg)
    stored = json.loads((tmp_path / "graph.json").read_text())
    # Their count for two layers of four heads: 1 + 4 + 1 + 4 + 1 writers, heads read three times.
    assert len(stored["edges"]) == 12 + 5 + 6 * 12 + 10 + 11
    chosen = {name: entry["score"] for name, entry in stored["edges"].items() if entry["in_graph"]}
    assert chosen == {"input->a1.h2<k>": 2.0, "input->a1.h3<k>": 2.0, "m0->a1.h3<q>": 1.0}
    # A file in which one of them is in the circuit, with a score of its own.
    stored["edges"]["input->a1.h2<k>"] = {"score": 0.5, "in_graph": False}
    found = ScoredGraph.load(write(tmp_path, stored), cfg)
    assert found.edges["embed", "a1.h1.k"] == 2.5
    assert ("embed", "a1.h1.k") in found.circuit


def changed(path: str, value):
    """Their file with something else at a place, or without it."""
    stored = json.loads(json.dumps(THEIRS))
    *steps, last = path.split("/")
    place = stored
    for step in steps:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return stored


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cfg": {}}, "expected mappings 'cfg', 'nodes' and 'edges', as Graph.to_json writes them"),
        (changed("cfg/n_layers", 3), "its n_layers is 3, the network's is 2"),
        (changed("nodes/m1", None), "1 nodes are missing: 'm1'"),
        (changed("edges/m7->logits", {"score": 1.0, "in_graph": True}), "1 edges are not the network's: 'm7->logits'"),
        (changed("edges/m1->logits", {"score": 1.0}), "'m1->logits' is .*, expected a mapping with 'in_graph'"),
        (changed("edges/m1->logits/score", "high"), "the score of 'm1->logits' is 'high', expected a number"),
        (changed("nodes/m0/neurons", [True]), r"'neurons' of 'm0' is \[True\], expected 3 entries"),
    ],
)
def test_damaged_files_say_what_is_wrong(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        ScoredGraph.load(write(tmp_path, content), CFG)


def test_nodes_that_a_network_lacks_are_refused_with_a_score(tmp_path):
    cfg = make_config(n_heads=1, d_model=3, d_head=3, attn_only=True)
    with pytest.raises(CheckpointError, match="'input->m0' has a score or is in the circuit, but the network has no"):
        ScoredGraph.load(write(tmp_path, THEIRS), cfg)


def test_other_failures(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read a scored graph from"):
        ScoredGraph.load(tmp_path / "none.json", CFG)
    graph = ScoredGraph(edges=ScoredEdges.of(CFG, {}), circuit=Circuit())
    with pytest.raises(InputError, match="cfg describes a network of other ones"):
        graph.save(tmp_path / "graph.json", ALL_CONFIGS["grouped"])
    with pytest.raises(CheckpointError, match="cannot write a scored graph to"):
        graph.save(tmp_path, CFG)
    with pytest.raises(SiteError, match=r"not scored, for they are none here: 'm8 -> logits'"):
        ScoredGraph(edges=graph.edges, circuit=Circuit([("m8", "logits")]))
    with pytest.raises(InputError, match=r"neurons is .* expected 2 axes, the first of the 5 writers"):
        ScoredGraph(edges=graph.edges, circuit=Circuit(), neurons=torch.ones(4, 3, dtype=torch.bool))
