import pytest

from hooklens.errors import InputError
from hooklens.patching import UnitCircuit
from tests.annotations import unchecked


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
