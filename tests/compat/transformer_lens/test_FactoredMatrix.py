"""Bad operands raise what 2.x raises, and HookLens's error; results are of the layer's class."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooklens import HookLensError
from hooklens.compat.transformer_lens import FactoredMatrix
from hooklens.errors import InputError
from hooklens.weights import factored
from tests.compat.transformer_lens.models import build


def _matrix(*leading: int, left: int = 5, inner: int = 2, right: int = 7) -> FactoredMatrix:
    return FactoredMatrix(torch.rand(*leading, left, inner), torch.rand(*leading, inner, right))


# What 2.18 raises in each case, told by its source.
REFUSED: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "inner sizes": (AssertionError, lambda: FactoredMatrix(torch.rand(3, 2), torch.rand(4, 5))),
    "a vector as a factor": (IndexError, lambda: FactoredMatrix(torch.rand(3, 2), torch.rand(2))),
    "leading axes": (RuntimeError, lambda: FactoredMatrix(torch.rand(3, 4, 2), torch.rand(2, 2, 4))),
    "a matrix on the right": (AssertionError, lambda: _matrix() @ torch.rand(6, 2)),
    "a factored one on the right": (AssertionError, lambda: _matrix() @ _matrix()),
    "a vector on the right": (RuntimeError, lambda: _matrix() @ torch.rand(6)),
    "a batch on the right": (RuntimeError, lambda: _matrix(3) @ torch.rand(2, 7, 7)),
    "a matrix on the left": (AssertionError, lambda: torch.rand(6, 2) @ _matrix()),
    "a vector on the left": (AssertionError, lambda: torch.rand(6) @ _matrix()),
    "no single number": (AssertionError, lambda: _matrix() * torch.rand(2)),
    "no single number on the left": (AssertionError, lambda: torch.rand(2) * _matrix()),
    "BA of no square": (AssertionError, lambda: _matrix().BA),
    "eigenvalues of no square": (AssertionError, lambda: _matrix().eigenvalues),
    "a new axis too far": (IndexError, lambda: _matrix().unsqueeze(5)),
    "an entry too far": (IndexError, lambda: _matrix(3)[4]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_what_2x_raises(name: str) -> None:
    kind, use = REFUSED[name]
    with pytest.raises(kind):
        use()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "an entry too far"])
def test_and_they_are_hooklens_errors_with_its_text(name: str) -> None:
    with pytest.raises(HookLensError) as raised:
        REFUSED[name][1]()
    assert isinstance(raised.value, InputError)
    assert "expected" in str(raised.value) or "square" in str(raised.value) or "takes" in str(raised.value)


def test_too_many_indices_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="at most 2 indices"):
        _matrix()[0, 0, 0]


def test_all_results_are_of_this_class() -> None:
    matrix, square = _matrix(3), torch.rand(7, 7)
    results = [
        matrix.T, matrix.transpose(), matrix @ square, matrix @ _matrix(3, left=7), torch.rand(5, 5) @ matrix,
        2 * matrix, matrix * torch.tensor(2.0), matrix[0], matrix[:, 1], matrix.unsqueeze(0), matrix.make_even(),
        _matrix(left=3, inner=5, right=4) @ torch.rand(4, 4),
    ]  # fmt: skip
    assert [type(one) for one in results] == [FactoredMatrix] * len(results)
    assert isinstance(matrix, factored.FactoredMatrix), "HookLens's functions take it"


def test_models_give_it_and_print_it_as_2x_does() -> None:
    model = build()
    for matrix in (model.OV, model.QK, model.blocks[0].attn.OV, model.blocks[0].attn.QK, model.OV[0, 1]):
        assert type(matrix) is FactoredMatrix
    assert repr(model.OV[0]) == "FactoredMatrix: Shape(torch.Size([4, 16, 16])), Hidden Dim(4)"


def test_products_are_those_of_matrices() -> None:
    matrix, other = _matrix(3), _matrix(3, left=7, right=4)
    vector: Tensor = torch.rand(7)
    torch.testing.assert_close((matrix @ other).AB, matrix.AB @ other.AB)
    torch.testing.assert_close(matrix @ vector, matrix.AB @ vector)
