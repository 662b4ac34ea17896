import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from hooklens.errors import HookLensError
from hooklens.patching import Circuit, ScoredEdges
from hooklens.patching.choices import programme
from hooklens.patching.choices.programme import solve
from hooklens.patching.graph.circuit import keep_paths
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


def best_by_brute_force(edges, k, *, signed):
    """The largest sum of `k` edges all of which lie on paths from the embeddings to the logits."""
    strength, table = edges.strength(signed=signed), edges.exists.nonzero().tolist()
    sums = []
    for chosen in combinations(table, k):
        circuit = Circuit((edges.writers[writer], edges.readers[reader]) for writer, reader in chosen)
        if keep_paths(circuit, edges.inputs) == circuit:
            sums.append(sum(float(strength[writer, reader]) for writer, reader in chosen))
    return max(sums)


def sum_of(edges, circuit, *, signed):
    strength = edges.strength(signed=signed)
    return sum(float(strength[edges.writers.index(one), edges.readers.index(other)]) for one, other in circuit)


def draw_edges(cfg, seed, *, heavy=False):
    edges = ScoredEdges.of(cfg, {})
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(edges.scores.shape, generator=generator, dtype=torch.float64)
    if heavy:
        scores = scores * torch.randn(edges.scores.shape, generator=generator, dtype=torch.float64).mul(2).exp()
    return replace(edges, scores=scores * edges.exists)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("margin", [1e-9, 0.001, 10.0])
def test_the_best_of_all_circuits_is_found(signed, margin, monkeypatch):
    """Whatever edges are tried first: hardly any, some, or all."""
    monkeypatch.setattr(programme, "_FIRST_MARGIN", margin)
    cfg = make_config(n_layers=2, n_heads=1, attn_only=True)
    for seed in range(2):
        edges = draw_edges(cfg, seed)
        for k in (2, 5):
            found = solve(edges, k, signed=signed, time_limit=None)
            assert len(found) == k
            assert found.pruned(cfg) == found
            best = best_by_brute_force(edges, k, signed=signed)
            assert sum_of(edges, found, signed=signed) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_few_edges_first_give_what_all_at_once_give(signed, monkeypatch):
    cfg = make_config(n_layers=4, n_heads=3, n_kv_heads=3, d_head=4, d_model=12)
    tried = []
    plain = programme._Programme.solve

    def counted(self, edges):
        tried.append(int(edges.sum()))
        return plain(self, edges)

    monkeypatch.setattr(programme._Programme, "solve", counted)
    for seed in range(3):
        edges = draw_edges(cfg, seed, heavy=True)
        for k in (5, 40):
            sums = []
            for margin in (1e-5, math.inf):
                monkeypatch.setattr(programme, "_FIRST_MARGIN", margin)
                tried.clear()
                sums.append(sum_of(edges, solve(edges, k, signed=signed, time_limit=None), signed=signed))
            assert tried == [edges.n_edges]
            assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_time_is_for_all_that_is_solved():
    """12 layers with 12 heads: 40 seconds were not enough for what takes a few now."""
    cfg = make_config(n_layers=12, n_heads=12, n_kv_heads=12, d_head=4, d_model=48)
    edges = draw_edges(cfg, 0, heavy=True)
    assert edges.n_edges == 32_491
    found = solve(edges, 50, signed=False, time_limit=None)
    assert found.pruned(cfg) == found
    with pytest.raises(HookLensError, match=r"of 50 of 32491 edges was not found within time_limit=0.01 seconds"):
        solve(edges, 50, signed=False, time_limit=0.01)
