import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import HookLensError
from hooklens.patching import Circuit, ScoredEdges, edge_auroc, overlap, rank_correlation
from hooklens.patching.graph.nodes import list_edges
from tests.model.networks import ALL_CONFIGS, make_config

CFG = make_config(n_layers=1, n_heads=2)
LISTED = list_edges(CFG)


@settings(max_examples=15)
@given(
    scores=st.lists(st.integers(-3, 3), min_size=len(LISTED), max_size=len(LISTED)),
    members=st.sets(st.sampled_from(LISTED), min_size=1, max_size=len(LISTED) - 1),
)
def test_auroc_is_the_share_of_pairs_in_order(scores, members):
    """Counted pair by pair; whole numbers give ties."""
    by_edge = dict(zip(LISTED, map(float, scores), strict=True))
    won = [
        float(abs(by_edge[inside]) > abs(by_edge[outside])) + 0.5 * (abs(by_edge[inside]) == abs(by_edge[outside]))
        for inside in members
        for outside in set(LISTED) - members
    ]
    found = edge_auroc(ScoredEdges.of(CFG, by_edge), Circuit(members))
    assert found == pytest.approx(sum(won) / len(won), abs=1e-12)


def test_auroc_of_circuits():
    edges = ScoredEdges.of(CFG, {})
    known = Circuit(LISTED[:4])
    assert edge_auroc(known, known, edges=edges) == 1.0
    assert edge_auroc(known.complement(CFG), known, edges=edges) == 0.0
    # Half of the true ones, no wrong one: those missed tie with all wrong ones.
    assert edge_auroc(Circuit(LISTED[:2]), known, edges=edges) == pytest.approx(0.75)
    assert edge_auroc(edges, known) == 0.5


def test_auroc_refuses_what_it_cannot_tell():
    edges = ScoredEdges.of(CFG, {})
    with pytest.raises(HookLensError, match="edges= says which edges there are where found is a circuit"):
        edge_auroc(Circuit(LISTED[:2]), Circuit(LISTED[:4]))
    with pytest.raises(HookLensError, match="edges= says which edges"):
        edge_auroc(edges, Circuit(LISTED[:4]), edges=edges)
    for known, n in ((Circuit(), 0), (Circuit(LISTED), len(LISTED))):
        with pytest.raises(HookLensError, match=f"holds {n} of {len(LISTED)} edges; there are no two kinds"):
            edge_auroc(edges, known)


def test_overlap():
    assert overlap(Circuit(LISTED[:3]), Circuit(LISTED[1:5])) == 2 / 5
    assert overlap(Circuit(), Circuit()) == 1.0
    assert overlap(Circuit(), Circuit(LISTED[:1])) == 0.0


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(-4, 5, (2, len(LISTED)), generator=generator).double()
    tables = [ScoredEdges.of(CFG, dict(zip(LISTED, row.tolist(), strict=True))) for row in (one, other)]
    expected = stats.spearmanr(one.abs(), other.abs()).statistic
    assert rank_correlation(*tables) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(tables[0], tables[0]) == pytest.approx(1.0)
    with pytest.raises(HookLensError, match="all edges have the same score"):
        rank_correlation(tables[0], ScoredEdges.of(CFG, {}))
    with pytest.raises(HookLensError, match="scores are of different networks"):
        rank_correlation(tables[0], ScoredEdges.of(ALL_CONFIGS["grouped"], {}))
