from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import HookLensError, InputError
from hooklens.patching import Circuit, EdgeChoice, ScoredEdges
from hooklens.patching.choices.choice import read_choice, take_greedily
from hooklens.patching.graph.nodes import list_edges
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_config

SMALL = make_config(n_layers=1, n_heads=2, n_kv_heads=1)
NETWORKS = {"small": SMALL, **{name: ALL_CONFIGS[name] for name in ("grouped", "rotary", "attention only")}}


def random_scores(cfg, seed: int) -> ScoredEdges:
    draws = torch.randn(len(list_edges(cfg)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ScoredEdges.of(cfg, dict(zip(list_edges(cfg), draws.tolist(), strict=True)))


def total(edges: ScoredEdges, circuit: Circuit, *, signed: bool) -> float:
    return sum(edges[edge] if signed else abs(edges[edge]) for edge in circuit)


def all_connected(edges: ScoredEdges, cfg, k: int) -> list[Circuit]:
    """Every circuit of `k` edges that stays whole when it is pruned, one subset of the edges after the other."""
    listed = list_edges(cfg)
    found = []
    for bits in range(2 ** len(listed)):
        if bits.bit_count() == k:
            circuit = Circuit(edge for place, edge in enumerate(listed) if bits >> place & 1)
            if circuit.pruned(cfg) == circuit:
                found.append(circuit)
    return found


@pytest.mark.parametrize("signed", [False, True])
def test_the_best_circuit_is_the_best_of_all(signed):
    pytest.importorskip("scipy")
    # 11 edges: embed to q, q, k, v, the MLP and the logits, both heads to these two, and the MLP to the logits.
    edges = random_scores(SMALL, 3)
    choice = EdgeChoice(search="optimal", by="signed" if signed else "absolute")
    assert edges.n_edges == len(list_edges(SMALL)) == 11
    for k in (1, 2, 3, 5, 8, 11):
        best = max(all_connected(edges, SMALL, k), key=lambda circuit: total(edges, circuit, signed=signed))
        assert choice.circuit(edges, k) == best


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=6)
@given(data=st.data())
def test_what_choices_promise(network, data):
    cfg = NETWORKS[network]
    edges = random_scores(cfg, data.draw(st.integers(0, 2**31)))
    k = data.draw(st.integers(0, edges.n_edges))
    by = data.draw(st.sampled_from(["absolute", "signed"]))
    signed = by == "signed"
    top, greedy, pruned = (EdgeChoice(search=one, by=by).circuit(edges, k) for one in ("top", "greedy", "pruned"))
    ranked = sorted(list_edges(cfg), key=lambda edge: edges[edge] if signed else abs(edges[edge]), reverse=True)
    assert top == Circuit(ranked[:k])
    assert pruned == top.pruned(cfg)
    assert len(greedy) == k
    # Nothing leads nowhere: every reader is the logits, or feeds what an edge of the circuit leaves.
    fed = {reader for writer in {writer for writer, _ in greedy} for reader in edges.inputs[writer]} | {"logits"}
    assert {reader for _, reader in greedy} <= fed


def test_greedy_choices_hold_each_other():
    edges = random_scores(NETWORKS["grouped"], 5)
    order = take_greedily(edges, edges.n_edges, signed=True)
    assert len(set(order)) == edges.n_edges
    for k in (0, 1, 7, 30):
        assert EdgeChoice(by="signed").circuit(edges, k) == Circuit(order[:k])


def test_the_best_circuit_is_no_worse_than_the_greedy_one():
    pytest.importorskip("scipy")
    cfg = NETWORKS["grouped"]
    edges = random_scores(cfg, 1)
    for k in (4, 17, 60):
        best = EdgeChoice(search="optimal").circuit(edges, k)
        assert len(best) == k
        assert best.pruned(cfg) == best
        greedy = EdgeChoice().circuit(edges, k).pruned(cfg)
        assert total(edges, best, signed=False) >= total(edges, greedy, signed=False)


def test_scores_of_nothing_but_nan_or_zero_are_chosen_in_the_order_of_the_table():
    edges = random_scores(SMALL, 1)
    empty = replace(edges, scores=torch.full_like(edges.scores, torch.nan))
    assert empty.top(2) == [("embed", "a0.h0.q"), ("embed", "a0.h1.q")]
    assert EdgeChoice().circuit(empty, 1) == Circuit([("embed", "logits")])


def test_arguments_are_refused_in_words():
    edges = random_scores(SMALL, 1)
    with unchecked(), pytest.raises(InputError, match=r"EdgeChoice: search is 'best', expected 'greedy', 'top'"):
        EdgeChoice(search="best")
    with unchecked(), pytest.raises(InputError, match="EdgeChoice: by is 'size'"):
        EdgeChoice(by="size")
    with pytest.raises(InputError, match="EdgeChoice: time_limit is -1"):
        EdgeChoice(time_limit=-1.0)
    with pytest.raises(InputError, match="circuit: k is -1"):
        EdgeChoice().circuit(edges, -1)
    with pytest.raises(InputError, match="both say how edges are chosen; leave connected out"):
        read_choice(EdgeChoice(), connected=False, what="here")
    with unchecked(), pytest.raises(InputError, match="here: choice is 'greedy', expected an EdgeChoice"):
        read_choice("greedy", connected=True, what="here")
    assert read_choice(None, connected=False, what="here") == EdgeChoice(search="top")


def test_a_limit_that_is_too_short_is_an_error():
    pytest.importorskip("scipy")
    edges = random_scores(make_config(n_layers=4, n_heads=4), 1)
    with pytest.raises(HookLensError, match=r"was not found within time_limit=1e-06 seconds; give it more time"):
        EdgeChoice(search="optimal", time_limit=1e-6).circuit(edges, 150)
