import pytest
import torch

from hooklens.errors import CheckpointError, InputError
from hooklens.patching import UnitCircuit, UnitScores
from tests.annotations import unchecked

SCORES = UnitScores(
    scores={"a": torch.tensor([1.0, -3.0, 0.5]), "b": torch.tensor([2.0, -0.25])},
    metric="LogitDiff",
    method="atp",
    ablation="zero",
)


def test_circuits_are_sets_of_entries():
    circuit = UnitCircuit({"a": [2, 0, 2], "b": []})
    assert circuit.kept == {"a": (0, 2), "b": ()}
    assert list(circuit) == [("a", 0), ("a", 2)]
    assert len(circuit) == 2
    assert ("a", 2) in circuit
    assert ("b", 2) not in circuit
    assert circuit == UnitCircuit({"a": (0, 2), "b": ()})
    assert len({circuit, UnitCircuit({"a": (0, 2), "b": ()}), UnitCircuit({"a": (0,), "b": ()})}) == 2
    assert circuit.to_mask("a", 4).tolist() == [True, False, True, False]
    assert repr(circuit) == "UnitCircuit(2 units; a: 2, b: 0)"
    with pytest.raises(InputError, match=r"a has 2 entries, and the circuit holds \[2\]"):
        circuit.to_mask("a", 2)
    with pytest.raises(InputError, match="an entry of a is -1"):
        UnitCircuit({"a": [-1]})
    with pytest.raises(InputError, match="no hook point is named"):
        UnitCircuit({})
    with unchecked(), pytest.raises(InputError, match="'a' is given 'all'; expected hook names and lists"):
        UnitCircuit({"a": "all"})


def test_choices_by_strength_and_by_sign():
    assert SCORES.top(3) == [("a", 1), ("b", 0), ("a", 0)]
    assert SCORES.top(3, by="signed") == [("b", 0), ("a", 0), ("a", 2)]
    assert SCORES.circuit(2) == UnitCircuit({"a": [1], "b": [0]})
    assert SCORES.circuit(1) == UnitCircuit({"a": [1], "b": []})
    assert SCORES["b", 1] == -0.25
    assert SCORES.to_dataframe().score.tolist() == [-3.0, 2.0, 1.0, 0.5, -0.25]
    assert [line.split() for line in repr(SCORES).splitlines()[2:4]] == [
        ["hook", "point", "entry", "score"],
        ["a", "1", "-3.00"],
    ]
    with pytest.raises(InputError, match=r"no unit \('b', 2\); units were scored at a, b"):
        SCORES["b", 2]
    with unchecked(), pytest.raises(InputError, match=r"UnitScores\.top: by is 'size'"):
        SCORES.top(1, by="size")


def test_random_circuits_are_of_a_seed():
    drawn = SCORES.random_circuit(3, seed=2)
    assert len(drawn) == 3
    assert drawn == SCORES.random_circuit(3, seed=2)
    assert len({SCORES.random_circuit(2, seed=seed) for seed in range(20)}) > 4
    with pytest.raises(InputError, match="random_circuit: k is 6"):
        SCORES.random_circuit(6)


def test_files(tmp_path):
    SCORES.save(tmp_path / "units.safetensors")
    again = UnitScores.load(tmp_path / "units.safetensors")
    assert (again.metric, again.method, again.ablation) == ("LogitDiff", "atp", "zero")
    assert all(torch.equal(again.scores[name], SCORES.scores[name]) for name in ("a", "b"))
    with pytest.raises(CheckpointError, match="cannot read scores of units"):
        UnitScores.load(tmp_path / "none.safetensors")
