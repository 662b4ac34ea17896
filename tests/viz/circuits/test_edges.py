import math

import pandas as pd
import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit
from hooklens.viz.circuits.edges import group_sizes, level_of, make_edges, name_level, read_pairs

PAIRS = {("embed", "a0.h0.q"): 0.5, ("a0.h0", "logits"): -1.0}


def test_edges_are_read_from_whatever_holds_some():
    scored = ScoredEdges(
        scores=torch.tensor([[0.5, 9.0], [9.0, -1.0]]),
        writers=("embed", "a0.h0"),
        readers=("a0.h0.q", "logits"),
        exists=torch.tensor([[True, False], [False, True]]),
    )
    table = pd.DataFrame([(*pair, score) for pair, score in PAIRS.items()], columns=["writer", "reader", "score"])
    for given in (scored, table, PAIRS, [(*pair, score) for pair, score in PAIRS.items()]):
        assert read_pairs(given) == PAIRS
    for given in (Circuit(PAIRS), table.drop(columns="score"), list(PAIRS)):
        found = read_pairs(given)
        assert found.keys() == PAIRS.keys()
        assert all(math.isnan(score) for score in found.values())


def test_what_holds_no_edges_is_refused():
    with pytest.raises(InputError, match=r"circuit: \(\) is no edge; expected \(writer, reader\)"):
        read_pairs(["embed"])
    with pytest.raises(InputError, match="circuit: the table lacks the columns 'reader'"):
        read_pairs(pd.DataFrame({"writer": ["a"]}))


def test_heads_that_share_keys_have_the_edge_in_common():
    """An edge into a key-value head was drawn into the query head of the same number, which may not read it."""
    readers = [*(f"a2.h{head}.q" for head in range(6)), *(f"a2.h{head}.{port}" for head in range(2) for port in "kv")]
    groups = group_sizes(readers)
    assert groups == {2: 3}
    pairs = {("embed", "a2.h1.v"): 1.0, ("embed", "a2.h0.k"): 1.0, ("embed", "a2.h1.q"): 1.0, ("a2.h5", "logits"): 1.0}
    edges = make_edges(pairs, {}, groups)
    assert [edge.nodes for edge in edges] == [("a2.h5",), ("a2.h0",), ("a2.h1",), ("logits",)]
    assert [edge.port for edge in edges] == ["v", "k", "q", ""]
    assert make_edges(pairs, {}, {}, otherwise=2)[0].nodes == ("a2.h2",)


def test_levels():
    nodes = ["embed", "a0.h1", "m0", "a1.h0", "m1", "logits"]
    levels = [level_of(node, {}) for node in nodes]
    assert levels == sorted(levels)
    assert len(set(levels)) == 6
    assert level_of("latent 5", {}) is None
    assert level_of("latent 5", {"latent 5": 3}) == (3.0, 0)
    assert [name_level(level, is_named=False) for level in levels] == [
        "",
        "attention 0",
        "MLP 0",
        "attention 1",
        "MLP 1",
        "",
    ]
    assert name_level((3.0, 0), is_named=True) == "layer 3"
