import pytest
import torch

from hooklens import viz
from hooklens.errors import InputError
from hooklens.weights.factored import FactoredMatrix
from tests.annotations import unchecked

LEFT, RIGHT = torch.randn(9, 3), torch.randn(3, 11)


def test_two_factors_are_multiplied_where_tokens_are_shown():
    made = viz.head_circuit(
        FactoredMatrix(LEFT, RIGHT), ["a", "b"], ids=[4, 0], column_tokens=["x", "y", "z"], column_ids=[10, 1, 1]
    )
    expected = (LEFT @ RIGHT)[[4, 0]][:, [10, 1, 1]]
    # Sums of three products in float32.
    torch.testing.assert_close(made.values[0], expected, atol=1e-5, rtol=1e-5)
    assert made.rows == ("source token", ("a", "b"))
    assert made.columns == ("output token", ("x", "y", "z"))


def test_the_largest_of_each_row_has_a_dot():
    values = torch.tensor([[1.0, 3.0], [2.0, -5.0]])
    made = viz.head_circuit(values, ["a", "b"], circuit="QK")
    assert made.texts == ((("", "●"), ("●", "")),)
    assert made.columns == ("key token", ("a", "b"))
    assert made._tell(0, 1, 0) == "query token b, key token a: 2.00 (largest of its row)"


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"head_circuit: ids holds \[9\]; the matrix has 0 to 8"):
        viz.head_circuit(FactoredMatrix(LEFT, RIGHT), ["a"], ids=[9])
    with pytest.raises(InputError, match="2 labels are given for rows, and the values have 1"):
        viz.head_circuit(LEFT, ["a", "b"], ids=[0])
    with pytest.raises(InputError, match="circuit is 'MLP'"), unchecked():
        viz.head_circuit(LEFT, ["a"], circuit="MLP")
    heads = FactoredMatrix(LEFT.expand(4, 9, 3), RIGHT.expand(4, 3, 11))
    with pytest.raises(InputError, match=r"head_circuit: the matrix has the shape \[4, 9, 11\]; expected two axes"):
        viz.head_circuit(heads, ["a"], ids=[0])
