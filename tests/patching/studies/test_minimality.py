import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.patching import Circuit, LogitDiff, Minimality, known, minimality
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff([3, 4, 5], [6, 7, 8])
CIRCUIT = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, progress=False).circuit(20)
NODES = tuple(dict.fromkeys(writer for writer, _ in CIRCUIT))


def measure(**options):
    return minimality(MODEL, CLEAN, CORRUPTED, CIRCUIT, METRIC, progress=False, **options)


def value_of(nodes) -> float:
    left = Circuit(edge for edge in CIRCUIT if edge[0] not in set(nodes))
    return float(patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [left], METRIC, progress=False).values[0])


def test_the_definition():
    beside = [NODES[0], NODES[2]]
    found = measure(sets={"both": beside}, n_random=0)
    assert found.parts == NODES
    assert found.sets == ("nothing", "both")
    for row, node in enumerate(NODES):
        alone = value_of([node]) - value_of([])
        others = [one for one in beside if one != node]
        with_others = value_of([*others, node]) - value_of(others)
        assert float(found.changes[row, 0]) == pytest.approx(alone, abs=1e-9)
        assert float(found.changes[row, 1]) == pytest.approx(with_others, abs=1e-9)
        assert float(found.scores[row]) == pytest.approx(max(abs(alone), abs(with_others)), abs=1e-9)
    full = float(patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [CIRCUIT], METRIC, progress=False).full)
    assert found.shares.tolist() == pytest.approx((found.scores / abs(full)).tolist())
    table = found.to_dataframe()
    assert table.score.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert table.beside[0] in found.sets


def test_needless_edges_of_a_known_circuit():
    """The true edges and three others: these alone can go."""
    task = known.induction(dtype=torch.float64)
    idle = [("a0.h0", "a1.h3.q"), ("a0.h1", "logits"), ("a0.h2", "a1.h1.v")]
    extra = [edge for edge in idle if edge not in task.circuit]
    found = minimality(
        task.model, task.pairs(6), circuit=task.circuit.with_edges(extra), metric=task.metric, unit="edges",
        n_random=0, progress=False,
    )  # fmt: skip
    needless = found.needless(0.5)
    assert set(needless) == {f"{writer} -> {reader}" for writer, reader in extra}
    assert len(found.parts) - len(needless) == len(task.circuit)


def test_random_sets_count_too():
    found = measure(n_random=3, seed=1)
    assert found.sets == ("nothing", "random 0", "random 1", "random 2")
    assert torch.equal(found.changes, measure(n_random=3, seed=1).changes)
    assert bool((found.scores >= found.changes[:, 0].abs()).all())


def test_files_and_plots(tmp_path):
    found = measure(n_random=1)
    found.save(tmp_path / "found.safetensors")
    again = Minimality.load(tmp_path / "found.safetensors")
    assert (again.parts, again.sets, again.full, again.metric) == (found.parts, found.sets, found.full, "LogitDiff")
    assert torch.equal(again.changes, found.changes)
    largest, alone = found.plot().data
    assert list(largest.y) == found.scores.tolist()
    assert list(alone.y) == found.changes[:, 0].abs().tolist()
    assert found.plot(backend="matplotlib") is not None
    assert repr(found).startswith(f"Minimality({len(NODES)} parts, 2 sets, LogitDiff; the least needed first)\n")
    (tmp_path / "no.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read the minimality of a circuit"):
        Minimality.load(tmp_path / "no.safetensors")


def test_refusals():
    with unchecked(), pytest.raises(patching.MetricError, match="a metric is a value such as"):
        minimality(MODEL, CLEAN, CORRUPTED, CIRCUIT, {"one": METRIC}, progress=False)
    with pytest.raises(InputError, match="minimality: n_random is -1"):
        measure(n_random=-1)
    with unchecked(), pytest.raises(InputError, match="minimality: circuit is 5, expected a Circuit"):
        minimality(MODEL, CLEAN, CORRUPTED, 5, METRIC)
    flat = Minimality(parts=("embed",), sets=("nothing",), changes=torch.ones(1, 1), full=0.0, metric="M")
    with pytest.raises(HookLensError, match="the network's M is 0"):
        _ = flat.shares
