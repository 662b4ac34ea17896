import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching import Circuit, ScoredEdges, SiteError
from hooklens.patching.graph.nodes import list_edges, list_readers, list_writers
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS

CFG = ALL_CONFIGS["grouped"]
EDGES = ScoredEdges.of(CFG, {("embed", "logits"): 2.0, ("a0.h3", "a1.h1.k"): -3.0})


def test_scores_by_edge():
    assert EDGES["embed", "logits"] == 2.0
    assert EDGES["a0.h3", "a1.h1.k"] == -3.0
    assert EDGES["m0", "m1"] == 0.0
    assert EDGES.n_edges == len(list_edges(CFG))
    assert (EDGES.writers, EDGES.readers) == (tuple(map(str, list_writers(CFG))), tuple(map(str, list_readers(CFG))))
    assert EDGES.top(2) == [("a0.h3", "a1.h1.k"), ("embed", "logits")]
    assert EDGES.top(1, signed=True) == [("embed", "logits")]
    assert EDGES.inputs["a1.h3"] == ["a1.h3.q", "a1.h1.k", "a1.h1.v"]
    lines = repr(EDGES).splitlines()
    assert lines[0] == "ScoredEdges(82 edges, 2 with a score other than 0)"
    assert lines[2].split() == ["a0.h3", "a1.h1.k", "-3.00"]
    table = EDGES.to_dataframe()
    assert (len(table), table.writer[0], table.score[0]) == (82, "a0.h3", -3.0)


def test_masks_are_those_of_circuits():
    circuit = Circuit([("embed", "m0"), ("a0.h1", "m1")])
    assert torch.equal(EDGES.to_mask(circuit), circuit.to_mask(CFG).T)


def test_what_does_not_fit_is_named():
    with pytest.raises(SiteError, match=r"does not fit the network, which has no nodes 'a7\.h0'"):
        ScoredEdges.of(CFG, {("a7.h0", "logits"): 1.0})
    with unchecked(), pytest.raises(InputError, match="expected a mapping from edge"):
        ScoredEdges.of(CFG, [1.0])
    with pytest.raises(SiteError, match=r"not scored, for they are none here: 'a0\.h0 -> m5'"):
        EDGES.to_mask(Circuit([("a0.h0", "m5")]))
    with pytest.raises(SiteError, match=r"no edge 'a9.h0' -> 'm0': \['a9.h0'\] is no node here"):
        EDGES["a9.h0", "m0"]
