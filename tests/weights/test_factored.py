"""FactoredMatrix against the dense product and torch.linalg in float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.weights.factored import FactoredMatrix
from tests.model.networks import Allocations

# Strategies build factored matrices, whose annotations beartype checks on samples that it draws with `random`.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

# Rounding of products and decompositions of matrices smaller than 8 x 8 with entries of size 1, in float64.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
sizes = st.integers(1, 7)


@st.composite
def factored(draw, left=None, right=None, leading=None):
    """A factored matrix with 0 to 2 leading axes, some of them broadcast."""
    leading = draw(st.lists(st.integers(1, 3), max_size=2)) if leading is None else leading
    left, right, inner = left or draw(sizes), right or draw(sizes), draw(sizes)
    axes_A, axes_B = leading, leading
    if leading and draw(st.booleans()):
        axes_A = [1, *leading[1:]]
    elif leading and draw(st.booleans()):
        axes_B = leading[1:]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    A = torch.randn(*axes_A, left, inner, generator=generator, dtype=torch.float64)
    B = torch.randn(*axes_B, inner, right, generator=generator, dtype=torch.float64)
    return FactoredMatrix(A, B)


@given(factored())
def test_sizes_follow_the_dense_product(matrix):
    dense = matrix.A @ matrix.B
    torch.testing.assert_close(matrix.AB, dense, rtol=0, atol=0)
    assert matrix.shape == dense.shape
    assert (matrix.ndim, matrix.has_leading_dims) == (dense.ndim, dense.ndim > 2)
    assert (matrix.ldim, matrix.rdim, matrix.mdim) == (dense.shape[-2], dense.shape[-1], matrix.A.shape[-1])
    assert [factor.shape[:-2] for factor in matrix.pair] == [dense.shape[:-2]] * 2


@given(factored())
def test_svd_rebuilds_the_matrix_from_orthonormal_factors(matrix):
    U, S, Vh = matrix.svd()
    rank = min(matrix.ldim, matrix.mdim, matrix.rdim)
    torch.testing.assert_close(U @ torch.diag_embed(S) @ Vh.mT, matrix.AB, **CLOSE)
    eye = torch.eye(rank, dtype=torch.float64).expand(*matrix.shape[:-2], rank, rank)
    for factor in (U, Vh):
        torch.testing.assert_close(factor.mT @ factor, eye, **CLOSE)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix.AB)[..., :rank], **CLOSE)
    assert matrix.U is U
    assert matrix.S is S
    assert matrix.Vh is Vh


@given(factored())
def test_norm_is_the_frobenius_norm(matrix):
    torch.testing.assert_close(matrix.norm(), torch.linalg.matrix_norm(matrix.AB), **CLOSE)


@given(st.data(), sizes)
def test_eigenvalues_are_those_of_the_dense_matrix_and_zeros(data, size):
    matrix = data.draw(factored(left=size, right=size, leading=[]))
    values = matrix.eigenvalues
    assert values.shape == (matrix.mdim,)
    # Symmetric functions of the spectrum do not depend on its order; extra zeros add nothing.
    power, dense = torch.eye(size, dtype=torch.float64), matrix.AB
    for exponent in range(1, 4):
        power = power @ dense
        scale = float(dense.norm()) ** exponent + 1
        torch.testing.assert_close(values.pow(exponent).sum().real, power.trace(), rtol=0, atol=1e-9 * scale)


def test_batched_eigenvalues_of_a_symmetric_matrix():
    A = torch.randn(3, 6, 2, dtype=torch.float64)
    values = FactoredMatrix(A, A.mT).eigenvalues
    expected = torch.linalg.eigvalsh(A @ A.mT)[..., -2:]
    torch.testing.assert_close(values.real.sort().values, expected, **CLOSE)
    assert values.imag.abs().max() < 1e-12


@given(factored())
def test_transpose_even_and_collapsed_forms(matrix):
    dense = matrix.AB
    torch.testing.assert_close(matrix.T.AB, dense.mT, **CLOSE)
    torch.testing.assert_close(matrix.transpose().AB, dense.mT, **CLOSE)
    even = matrix.make_even()
    torch.testing.assert_close(even.AB, dense, **CLOSE)
    torch.testing.assert_close(even.A.norm(dim=-2), even.B.norm(dim=-1), **CLOSE)
    left, right = matrix.collapse_l(), matrix.collapse_r()
    torch.testing.assert_close(left.mT @ left, dense.mT @ dense, **CLOSE)
    torch.testing.assert_close(right @ right.mT, dense @ dense.mT, **CLOSE)


@given(factored(), st.integers(1, 8))
def test_corner_is_the_first_entries_along_every_axis(matrix, k):
    torch.testing.assert_close(matrix.get_corner(k), matrix.AB[(slice(k),) * matrix.ndim], **CLOSE)


@given(st.data(), factored())
def test_products_with_matrices_and_factored_matrices_on_both_sides(data, matrix):
    leading = list(matrix.shape[:-2]) if data.draw(st.booleans()) else []
    right = data.draw(factored(left=matrix.rdim, leading=leading))
    left = data.draw(factored(right=matrix.ldim, leading=leading))
    dense = matrix.AB
    for product, expected in (
        (matrix @ right, dense @ right.AB),
        (matrix @ right.AB, dense @ right.AB),
        (left @ matrix, left.AB @ dense),
        (left.AB @ matrix, left.AB @ dense),
    ):
        assert isinstance(product, FactoredMatrix)
        torch.testing.assert_close(product.AB, expected, **CLOSE)


@given(factored())
def test_a_product_with_a_matrix_takes_the_smaller_inner_size(matrix):
    right, left = torch.randn(matrix.rdim, 9).double(), torch.randn(9, matrix.ldim).double()
    assert (matrix @ right).mdim == min(matrix.mdim, matrix.rdim)
    assert (left @ matrix).mdim == min(matrix.mdim, matrix.ldim)


@given(factored())
def test_products_with_vectors_are_tensors(matrix):
    right, left = torch.randn(matrix.rdim, dtype=torch.float64), torch.randn(matrix.ldim, dtype=torch.float64)
    torch.testing.assert_close(matrix @ right, matrix.AB @ right, **CLOSE)
    torch.testing.assert_close(left @ matrix, left @ matrix.AB, **CLOSE)


@given(factored(), st.sampled_from([3, -0.5, torch.tensor(2.0), torch.tensor([[2.0]])]))
def test_scalar_multiples(matrix, scalar):
    expected = matrix.AB * float(scalar)
    torch.testing.assert_close((matrix * scalar).AB, expected, **CLOSE)
    torch.testing.assert_close((scalar * matrix).AB, expected, **CLOSE)
    assert (matrix * scalar).shape == matrix.shape


@st.composite
def indices(draw, shape):
    """An index a dense tensor of this shape takes too, with ints on the matrix axes written as slices there."""
    ours, dense = [], []
    for axis, size in enumerate(shape):
        in_matrix = axis >= len(shape) - 2
        kind = draw(st.sampled_from(["int", "slice", "all"]))
        if kind == "int":
            index = draw(st.integers(-size, size - 1))
            ours.append(index)
            dense.append(slice(index % size, index % size + 1) if in_matrix else index)
            continue
        if not in_matrix and draw(st.integers(0, 4)) == 0:
            ours.append(None)
            dense.append(None)
        start, stop = draw(st.integers(0, size - 1)), size
        step = draw(st.integers(1, 2))
        index = slice(start, stop, step) if kind == "slice" else slice(None)
        ours.append(index)
        dense.append(index)
    keep = draw(st.integers(0, len(ours)))
    if draw(st.booleans()):
        ours, dense = ours[:keep], dense[:keep]
    return tuple(ours), tuple(dense)


@given(st.data(), factored())
def test_indexing_is_that_of_the_dense_product_with_matrix_axes_kept(data, matrix):
    ours, dense = data.draw(indices(matrix.shape))
    taken = matrix[ours]
    assert isinstance(taken, FactoredMatrix)
    torch.testing.assert_close(taken.AB, matrix.AB[dense], **CLOSE)


@given(st.data())
def test_ellipsis_masks_and_lists(data):
    matrix = data.draw(factored(leading=[3, 2]))
    assume(matrix.ldim > 1)
    dense = matrix.AB
    mask = torch.tensor([True, False, True])
    rows = [matrix.ldim - 1, 0]
    cases = {
        "row": (matrix[..., -1, :], dense[..., -1:, :]),
        "column": (matrix[..., 0], dense[..., :1]),
        "leading": (matrix[1, ...], dense[1]),
        "mask": (matrix[mask], dense[mask]),
        "mask over both": (matrix[dense[..., 0, 0] > -99], dense.flatten(0, 1)),
        "list": (matrix[[2, 0]], dense[[2, 0]]),
        "rows": (matrix[:, :, rows], dense[:, :, rows]),
        "rows by tensor": (matrix[1, :, torch.tensor(rows), :1], dense[1][:, rows][..., :1]),
        "numpy int": (matrix[np.int64(1), :, np.int64(-1)], dense[1, :, -1:]),
        "new axis": (matrix[None, :, 0], dense[None, :, 0]),
    }
    for name, (taken, expected) in cases.items():
        torch.testing.assert_close(taken.AB, expected, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def test_negative_row_minus_one_is_the_last_row():
    """TransformerLens made slice(-1, 0) of it, which is empty."""
    matrix = FactoredMatrix(torch.randn(4, 2), torch.randn(2, 5))
    assert matrix[-1].shape == (1, 5)
    assert matrix[-1, -1].shape == (1, 1)


@given(factored())
def test_unsqueeze_puts_a_leading_axis_in(matrix):
    for k in range(matrix.ndim - 1):
        torch.testing.assert_close(matrix.unsqueeze(k).AB, matrix.AB.unsqueeze(k), **CLOSE)
        negative = k - matrix.ndim - 1
        torch.testing.assert_close(matrix.unsqueeze(negative).AB, matrix.AB.unsqueeze(negative), **CLOSE)


def test_nothing_of_size_left_times_right_is_made():
    """With 4 million rows and columns the product would take 64 TB."""
    n = 2**22
    matrix = FactoredMatrix(torch.ones(n, 1), torch.ones(1, n))
    assert matrix.norm() == n
    assert matrix.S.tolist() == [n]
    assert matrix.eigenvalues.tolist() == [n]
    assert (matrix @ matrix).norm().item() == pytest.approx(float(n) ** 2)
    assert (matrix @ torch.ones(n))[0] == n
    assert matrix.get_corner(2).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32_and_rounded_once(dtype):
    half = FactoredMatrix(torch.randn(6, 2).to(dtype), torch.randn(2, 5).to(dtype))
    full = FactoredMatrix(half.A.float(), half.B.float())
    assert torch.equal(half.S, full.S.to(dtype))
    assert torch.equal(half.norm(), full.norm().to(dtype))
    assert half.make_even().A.dtype == dtype


def test_gradients_flow_through_singular_values_more_than_once():
    """A remembered decomposition must not be walked backwards twice."""
    A = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    matrix = FactoredMatrix(A, torch.randn(2, 4, dtype=torch.float64))
    for _ in range(2):
        A.grad = None
        matrix.S.square().sum().backward()
        (expected,) = torch.autograd.grad((A @ matrix.B).square().sum(), A)
        torch.testing.assert_close(A.grad, expected, **CLOSE)


def test_repr_names_shape_inner_size_and_dtype():
    matrix = FactoredMatrix(torch.zeros(3, 5, 2), torch.zeros(2, 7))
    assert repr(matrix) == "FactoredMatrix(shape=(3, 5, 7), inner=2, dtype=torch.float32)"


M = FactoredMatrix(torch.zeros(3, 5, 2), torch.zeros(3, 2, 4))
ERRORS = {
    "inner": (lambda: FactoredMatrix(torch.zeros(5, 2), torch.zeros(3, 4)), r"\(5, 2\) and \(3, 4\).*equal inner"),
    "vector": (lambda: FactoredMatrix(torch.zeros(5), torch.zeros(5, 4)), r"shapes \(5,\) and \(5, 4\)"),
    "leading": (
        lambda: FactoredMatrix(torch.zeros(3, 5, 2), torch.zeros(2, 2, 4)),
        r"FactoredMatrix: leading axes \(3,\) and \(2,\) do not broadcast",
    ),
    "not square": (lambda: M.eigenvalues, "need a square matrix; this one is 5 x 4"),
    "matmul": (lambda: M @ torch.zeros(5, 4), r"shapes \(3, 5, 4\) and \(5, 4\)"),
    "rmatmul": (lambda: torch.zeros(4, 4) @ M, r"shapes \(4, 4\) and \(3, 5, 4\)"),
    "right vector": (lambda: M @ torch.zeros(3), r"cannot multiply.*\(3, 5, 4\) and \(3, 1\)"),
    "left vector": (lambda: torch.zeros(3) @ M, r"cannot multiply.*\(1, 3\)"),
    "factored": (lambda: M @ M, r"\(3, 5, 4\) and \(3, 5, 4\)"),
    "product leading": (lambda: M @ torch.zeros(2, 4, 4), r"matrix product: leading axes \(3,\) and \(2,\)"),
    "times tensor": (lambda: M * torch.ones(3), r"tensor of shape \(3,\): expected a single number; use @"),
    "too long": (lambda: M[0, 0, 0, 0], r"does not fit a FactoredMatrix of shape \(3, 5, 4\): expected at most 3"),
    "ellipses": (lambda: M[..., 0, ...], "one ellipsis"),
    "row": (lambda: M[0, 5], "row index 5 is out of range for 5 rows"),
    "column": (lambda: M[0, 0, -5], "column index -5 is out of range for 4 columns"),
    "row axis": (lambda: M[0, 0, None], "column index None: expected an int"),
    "row mask": (lambda: M[0, torch.zeros(2, 2, dtype=torch.long)], r"row index has shape \(2, 2\)"),
    "unsqueeze": (lambda: M.unsqueeze(2), r"unsqueeze\(2\).*takes a new axis at 0 to 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_found(case):
    run, text = ERRORS[case]
    with pytest.raises(InputError, match=text):
        run()


@pytest.mark.parametrize("run", [lambda: M @ 3, lambda: M * "a", lambda: 3 @ M])
def test_operands_of_another_type_are_type_errors(run):
    with pytest.raises(TypeError):
        run()


def test_eigenvalues_of_half_precision_factors_are_those_of_their_product():
    """`B A` was rounded to bfloat16 before its eigenvalues were taken, which moved them by some percent."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 8), (8, 64)))
    expected = torch.linalg.eigvals(B.double() @ A.double())
    for value in FactoredMatrix(A, B).eigenvalues:
        # Eigenvalues of size 10, decomposed in float32.
        assert (expected - value).abs().min() < 1e-4


def test_nothing_of_full_size_is_made():
    """A circuit between tokens, over 2 x 3 heads: 50 x 50 and 40 x 40 are the sizes to avoid."""
    d_vocab, d_model, d_head = 50, 40, 4
    W_E, W_U = torch.randn(d_vocab, d_model), torch.randn(d_model, d_vocab)
    heads = FactoredMatrix(torch.randn(2, 3, d_model, d_head), torch.randn(2, 3, d_head, d_model))
    with Allocations() as allocations:
        for matrix in (heads, heads.T, heads @ heads, W_E @ heads @ W_U, (heads.unsqueeze(0) * 2)[0, 1, 1:, ...]):
            _ = matrix.svd(), matrix.eigenvalues, matrix.norm(), matrix.BA, matrix.make_even()
            _ = matrix.collapse_l(), matrix.collapse_r(), matrix.get_corner(), matrix[..., 3, :], matrix[..., 1:3]
            _ = matrix @ torch.randn(matrix.rdim), torch.randn(matrix.ldim) @ matrix
    assert allocations.sizes
    # No other axis is longer than 8.
    assert [shape for _, shape in allocations.sizes if sum(size >= d_model for size in shape) > 1] == []
