import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.patching import Circuit, LogitDiff, Pair, ScoredEdges, Stability, stability
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
PAIRS = [
    Pair(random_tokens(1, 5, seed=row)[0], random_tokens(1, 5, seed=50 + row)[0], answer=row, wrong=20 - row)
    for row in range(6)
]
METRIC = LogitDiff()


def test_runs_are_those_of_the_discovery_on_parts_of_the_pairs():
    found = stability(MODEL, PAIRS, metric=METRIC, size=9, n_runs=3, fraction=0.5, seed=4, progress=False)
    assert found.seeds == (4, 5, 6)
    assert all(len(rows) == 3 for rows in found.rows)
    assert len(set(found.rows)) > 1
    tables = []
    for circuit, rows in zip(found.circuits, found.rows, strict=True):
        scores = patching.edge_attribution(
            MODEL, [PAIRS[row] for row in rows], metric=METRIC, method="eap-ig-inputs", progress=False
        )
        assert circuit == scores.circuit(9)
        tables.append(scores.scores[scores.exists].abs())
    one, other = found.circuits[0], found.circuits[2]
    assert float(found.overlaps[0, 2]) == len(one & other) / len(one | other)
    stats = pytest.importorskip("scipy.stats")
    expected = stats.spearmanr(tables[0], tables[2]).statistic
    assert float(found.rank_correlations[0, 2]) == pytest.approx(expected, abs=1e-12)
    upper = [float(found.overlaps[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.overlap == pytest.approx(sum(upper) / 3)
    table = found.to_dataframe()
    assert table.overlap.tolist() == upper
    assert list(table.columns) == ["run", "other", "overlap", "rank_correlation"]


def test_what_a_discovery_is_handed():
    seen = []

    def discover(pairs, metric, seed):
        seen.append((len(pairs), seed))
        return Circuit([("embed", "logits"), *([("m1", "logits")] if seed % 2 else [])])

    found = stability(MODEL, PAIRS, metric=METRIC, discover=discover, n_runs=4, fraction=None, seed=10, progress=False)
    assert seen == [(6, 10), (6, 11), (6, 12), (6, 13)]
    assert found.frequencies() == {("embed", "logits"): 1.0, ("m1", "logits"): 0.5}
    assert found.consensus() == Circuit([("embed", "logits")])
    assert found.consensus(0.5) == Circuit([("embed", "logits"), ("m1", "logits")])
    assert found.overlap == pytest.approx((2 * 1.0 + 4 * 0.5) / 6)
    with pytest.raises(HookLensError, match="the discovery gave circuits alone"):
        _ = found.rank_correlation
    with pytest.raises(HookLensError, match="consensus: share is 0"):
        found.consensus(0.0)
    assert repr(found).splitlines()[0] == "Stability(4 runs on 6 pairs each, circuits of 1 to 2 edges, overlap 0.667)"


def test_the_search_of_acdc_is_a_discovery():
    def discover(pairs, metric, seed):
        return patching.discover_circuit(MODEL, pairs, metric=metric, threshold=0.05, progress=False).circuit

    found = stability(MODEL, PAIRS, metric=METRIC, discover=discover, n_runs=2, progress=False)
    assert found.circuits[0] == discover([PAIRS[row] for row in found.rows[0]], METRIC, 0)


@pytest.mark.parametrize("scored", [True, False])
def test_files_and_plots(scored, tmp_path):
    draws = iter(range(9))

    def discover(pairs, metric, seed):
        edges = {("embed", "logits"): 2.0, ("m1", "logits"): float(next(draws))}
        return ScoredEdges.of(MODEL.cfg, edges) if scored else Circuit(edges)

    size = 1 if scored else None
    found = stability(MODEL, PAIRS, metric=METRIC, discover=discover, size=size, n_runs=3, progress=False)
    found.save(tmp_path / "stability.safetensors")
    again = Stability.load(tmp_path / "stability.safetensors")
    assert (again.circuits, again.rows, again.seeds) == (found.circuits, found.rows, found.seeds)
    assert scored == (again.rank_correlations is not None)
    if scored:
        assert torch.equal(again.rank_correlations, found.rank_correlations)
    assert len(found.plot().data) == 1 + scored
    assert len(found.plot(backend="matplotlib", title="t").axes) >= 1 + scored
    patching.edge_attribution(MODEL, PAIRS[:2], metric=METRIC, progress=False).save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the stability of a discovery"):
        Stability.load(tmp_path / "other.safetensors")


def test_refusals():
    def circuits(pairs, metric, seed):
        return 5

    with unchecked(), pytest.raises(InputError, match="the discovery gave 5; expected a Circuit"):
        stability(MODEL, PAIRS, metric=METRIC, discover=circuits, progress=False)
    with pytest.raises(InputError, match="gives scores; say with size= how many edges"):
        stability(MODEL, PAIRS, metric=METRIC, progress=False)
    for options, message in (
        ({"n_runs": 1}, "stability: n_runs is 1"),
        ({"fraction": 2.0}, "stability: fraction is 2.0, expected a number between 0 and 1, or None"),
        ({"size": 0}, "stability: size is 0, expected a whole number >= 1, or None"),
    ):
        with pytest.raises(InputError, match=message):
            stability(MODEL, PAIRS, metric=METRIC, **options)
