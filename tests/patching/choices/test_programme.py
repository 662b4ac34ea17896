import pytest

from hooklens.errors import HookLensError
from hooklens.patching import Circuit, ScoredEdges
from hooklens.patching.choices.programme import solve
from tests.model.networks import make_config

pytest.importorskip("scipy")
CFG = make_config(n_layers=2, n_heads=2, attn_only=True)


def test_a_strong_edge_brings_the_weak_ones_that_connect_it():
    edges = ScoredEdges.of(CFG, {("a0.h1", "a1.h0.k"): 5.0, ("embed", "logits"): 1.0, ("embed", "a0.h0.v"): 2.0})
    assert solve(edges, 1, signed=False, time_limit=None) == Circuit([("embed", "logits")])
    three = solve(edges, 3, signed=False, time_limit=None)
    assert ("a0.h1", "a1.h0.k") in three
    assert ("a1.h0", "logits") in three
    assert three.pruned(CFG) == three


def test_no_edges_are_the_empty_circuit():
    assert solve(ScoredEdges.of(CFG, {}), 0, signed=True, time_limit=None) == Circuit()


def test_signed_sums_take_harm_only_where_nothing_else_connects():
    harm = {("embed", f"a0.h0.{kind}"): -1.0 for kind in "qkv"} | {("a0.h0", "logits"): 10.0}
    found = solve(ScoredEdges.of(CFG, harm), 2, signed=True, time_limit=None)
    assert ("a0.h0", "logits") in found
    assert sum(reader.startswith("a0.h0") for _, reader in found) == 1


def test_sizes_that_no_circuit_has_are_refused():
    # One layer without an MLP, one head: embed to q, k, v and the logits, the head to the logits; five in all.
    cfg = make_config(n_layers=1, n_heads=1, attn_only=True)
    edges = ScoredEdges.of(cfg, {("embed", "logits"): 1.0})
    assert len(solve(edges, 2, signed=False, time_limit=None)) == 2
    with pytest.raises(HookLensError, match="no circuit of exactly 6 edges has all of them on paths"):
        solve(edges, 6, signed=False, time_limit=None)
