import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, InputError
from hooklens.patching import Circuit, Completeness, LogitDiff, Pair, SiteError, completeness
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff([3, 4, 5], [6, 7, 8])
FULL = Circuit.full(MODEL.cfg)
CIRCUIT = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, progress=False).circuit(30)
NODES = tuple(dict.fromkeys(writer for writer, _ in CIRCUIT))


def measure(**options):
    return completeness(MODEL, CLEAN, CORRUPTED, CIRCUIT, METRIC, progress=False, **options)


def value_of(circuit: Circuit) -> float:
    found = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [circuit], METRIC, progress=False)
    return float(found.values[0])


def without(circuit: Circuit, nodes) -> Circuit:
    return Circuit(edge for edge in circuit if edge[0] not in nodes)


def test_the_definition_on_sets_of_nodes():
    sets = {"two": NODES[1:3], "one": [NODES[0]]}
    found = measure(sets=sets, n_random=0)
    assert found.sets == ("nothing", "two", "one")
    for row, nodes in enumerate([(), *sets.values()]):
        of_circuit, of_network = value_of(without(CIRCUIT, nodes)), value_of(without(FULL, nodes))
        assert float(found.circuit.values[row]) == pytest.approx(of_circuit, abs=1e-9)
        assert float(found.network.values[row]) == pytest.approx(of_network, abs=1e-9)
        assert float(found.incompleteness[row]) == pytest.approx(abs(of_circuit - of_network), abs=1e-9)
    pairwise = found.circuit.per_pair - found.network.per_pair
    torch.testing.assert_close(found.incompleteness_errors, pairwise.std(1) / 3**0.5)
    table = found.to_dataframe()
    assert table.edges_removed.tolist() == [
        0, *(sum(writer in nodes for writer, _ in CIRCUIT) for nodes in sets.values())
    ]  # fmt: skip
    assert found.worst == table.set[table.incompleteness.argmax()]
    assert repr(found).startswith("Completeness(3 sets, LogitDiff; largest incompleteness ")


def test_single_edges():
    edge = CIRCUIT.edges[7]
    found = measure(unit="edges", sets={"it": [f"{edge[0]} -> {edge[1]}"]}, n_random=0)
    assert found.circuit.circuits[1] == CIRCUIT.without_edges([edge])
    assert found.network.circuits[1] == FULL.without_edges([edge])


def test_the_whole_network_is_complete():
    found = completeness(MODEL, CLEAN, CORRUPTED, FULL, METRIC, n_random=4, progress=False)
    assert float(found.incompleteness.max()) == 0.0


def test_random_sets_are_those_of_a_seed():
    one, same, other = (measure(n_random=3, seed=seed).circuit.circuits for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(one) == 4


def test_the_greedy_search_takes_the_worst_part_of_each_step():
    found = measure(n_random=0, greedy_steps=2)
    removed: list[str] = []
    for step in (1, 2):
        scores = {
            node: abs(value_of(without(CIRCUIT, [*removed, node])) - value_of(without(FULL, [*removed, node])))
            for node in NODES
            if node not in removed
        }
        removed.append(max(scores, key=scores.get))
        assert found.sets[step] == f"greedy {step}: {removed[-1]}"
        assert float(found.incompleteness[step]) == pytest.approx(scores[removed[-1]], abs=1e-9)


def test_what_the_circuit_lacks_shows_when_all_of_it_is_gone():
    """Without all of its nodes the circuit is empty, and the network keeps the others."""
    found = measure(sets={"all": list(NODES)}, n_random=0)
    empty = value_of(Circuit())
    assert float(found.circuit.values[1]) == pytest.approx(empty, abs=1e-9)
    assert float(found.incompleteness[1]) == pytest.approx(abs(empty - value_of(without(FULL, NODES))), abs=1e-9)


def test_pairs_and_padding_are_read_as_everywhere():
    pairs = [Pair(CLEAN[row], CORRUPTED[row], answer=[3, 4, 5][row], wrong=[6, 7, 8][row]) for row in range(3)]
    found = completeness(MODEL, pairs, circuit=CIRCUIT, metric=LogitDiff(), n_random=1, progress=False)
    torch.testing.assert_close(found.incompleteness, measure(n_random=1).incompleteness, rtol=0, atol=1e-10)


def test_files_and_plots(tmp_path):
    found = measure(n_random=2)
    found.save(tmp_path / "found.safetensors")
    again = Completeness.load(tmp_path / "found.safetensors")
    assert again.sets == found.sets
    assert torch.equal(again.incompleteness, found.incompleteness)
    assert again.network.circuits == found.network.circuits
    found.circuit.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not hold a completeness"):
        Completeness.load(tmp_path / "other.safetensors")
    circuit, network = found.plot().data
    assert list(circuit.y) == found.circuit.values.tolist()
    assert list(network.y) == found.network.values.tolist()
    assert found.plot(backend="matplotlib") is not None


def test_refusals():
    with unchecked(), pytest.raises(patching.MetricError, match="a metric is a value such as"):
        completeness(MODEL, CLEAN, CORRUPTED, CIRCUIT, {"one": METRIC}, progress=False)
    with pytest.raises(SiteError, match=r"completeness: \['a1.h9'\] are no nodes of the circuit, which has embed"):
        measure(sets={"x": ["a1.h9"]})
    with unchecked(), pytest.raises(InputError, match="the set 'x' is 'embed'; expected names of nodes"):
        measure(sets={"x": "embed"})
    with pytest.raises(InputError, match="the set 'random 1' has a name of those that are drawn"):
        measure(sets={"random 1": ["embed"]})
    with unchecked(), pytest.raises(InputError, match="completeness: unit is 'heads', expected 'nodes' or 'edges'"):
        measure(unit="heads")
    with pytest.raises(InputError, match="the circuit has no edges"):
        completeness(MODEL, CLEAN, CORRUPTED, Circuit(), METRIC)
    with pytest.raises(InputError, match="completeness: greedy_steps is 99"):
        measure(greedy_steps=99)
    with pytest.raises(InputError, match="circuit and metric missing"):
        completeness(MODEL, CLEAN, CORRUPTED)
