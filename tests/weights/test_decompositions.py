"""Gradients of decompositions against those of the dense matrix, in float64."""

import pytest
import torch

from hooklens.weights.composition import all_composition_scores, composition_scores
from hooklens.weights.decompositions import product_svd, right_factor
from hooklens.weights.factored import FactoredMatrix

# (leading axes, left, inner, right): tall, wide, square and batched factors, inner sizes below and above the others.
SHAPES = [((), 5, 2, 4), ((), 3, 6, 4), ((), 4, 3, 4), ((), 1, 1, 1), ((2, 3), 4, 2, 3), ((2,), 2, 5, 5)]
# Rounding of products of a few terms of size one in float64, times the condition of random matrices this small.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}

FUNCTIONS = {
    "norm": (lambda m: m.norm(), torch.linalg.matrix_norm),
    "sum of singular values": (lambda m: m.S.sum(-1), lambda X: torch.linalg.matrix_norm(X, "nuc")),
    "cubed singular values": (lambda m: m.S.pow(3).sum(-1), lambda X: torch.linalg.svdvals(X).pow(3).sum(-1)),
    "rebuilt": (lambda m: m.U @ torch.diag_embed(m.S) @ m.Vh.mT, lambda X: X),
    "even": (lambda m: m.make_even().AB, lambda X: X),
    "collapse_l": (lambda m: m.collapse_l().mT @ m.collapse_l(), lambda X: X.mT @ X),
    "collapse_r": (lambda m: m.collapse_r() @ m.collapse_r().mT, lambda X: X @ X.mT),
    "AB": (lambda m: m.AB, lambda X: X),
    "transpose": (lambda m: m.T.AB, lambda X: X.mT),
    "product": (lambda m: (m @ m.T).AB, lambda X: X @ X.mT),
    "norm of a product": (lambda m: (m @ m.T).norm(), lambda X: torch.linalg.matrix_norm(X @ X.mT)),
    "corner": (lambda m: m[..., :2, -1].AB, lambda X: X[..., :2, -1:]),
}
SQUARE = {
    "BA": (lambda m: m.BA.diagonal(dim1=-2, dim2=-1).sum(-1), lambda X: X.diagonal(dim1=-2, dim2=-1).sum(-1)),
    "eigenvalues": (
        lambda m: m.eigenvalues.pow(3).sum(-1).real,
        lambda X: (X @ X @ X).diagonal(dim1=-2, dim2=-1).sum(-1),
    ),
}


def random_factors(leading, left, inner, right):
    A = torch.randn(*leading, left, inner, dtype=torch.float64, requires_grad=True)
    return A, torch.randn(*leading, inner, right, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, *SQUARE])
def test_gradients_are_those_of_the_dense_matrix(name, shape):
    """`norm().backward()` raised: the triangular factor alone has no derivative in torch."""
    if name in SQUARE and shape[1] != shape[3]:
        shape = (*shape[:3], shape[1])
    ours, dense = (FUNCTIONS | SQUARE)[name]
    A, B = random_factors(*shape)
    value, expected = ours(FactoredMatrix(A, B)), dense(A @ B)
    torch.testing.assert_close(value, expected, **CLOSE)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((value * weights).sum(), (A, B))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), (A, B)), **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["norm", "cubed singular values", "even", "collapse_l", "collapse_r"])
def test_gradients_are_finite_differences(name, shape):
    assert torch.autograd.gradcheck(lambda A, B: FUNCTIONS[name][0](FactoredMatrix(A, B)), random_factors(*shape))


def test_singular_vectors():
    """Their sign is free, so products of two entries of one vector are compared."""
    A, B = random_factors((), 5, 3, 4)
    assert torch.autograd.gradcheck(
        lambda A, B: [part.mT[:, :, None] * part.mT[:, None] for part in product_svd(A, B)[::2]], (A, B)
    )


def test_singular_values_have_second_derivatives():
    assert torch.autograd.gradgradcheck(lambda A, B: product_svd(A, B)[1].pow(3).sum(), random_factors((), 3, 2, 4))


def test_a_second_derivative_of_norms_is_refused():
    """The gradient holds to first order only; a second one would be wrong."""
    A, B = random_factors((), 3, 2, 4)
    (grad,) = torch.autograd.grad(FactoredMatrix(A, B).norm(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("function", [lambda m: m.norm(), lambda m: m.S.sum(), lambda m: m.S[0]])
def test_norms_of_matrices_with_equal_or_no_singular_values_have_finite_gradients(function):
    orthogonal = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    dependent = torch.ones(4, 3, dtype=torch.float64)
    for left, right in (
        (torch.eye(4, 3).double(), torch.eye(3, 4).double()),
        (orthogonal, orthogonal[:2].T @ orthogonal[:2]),
        (dependent, dependent.T),
        (torch.zeros(4, 3).double(), dependent.T),
        (torch.zeros(4, 3).double(), torch.zeros(3, 4).double()),
    ):
        A, B = left.clone().requires_grad_(), right.clone().requires_grad_()
        function(FactoredMatrix(A, B)).backward()
        assert A.grad.isfinite().all()
        assert B.grad.isfinite().all()
    A, B = torch.zeros(4, 3, requires_grad=True), torch.ones(3, 4)
    FactoredMatrix(A, B).norm().backward()
    assert A.grad.equal(torch.zeros(4, 3))


def test_norms_of_dependent_factors_have_exact_gradients():
    """The derivative of a QR decomposition divides by the zeros on the diagonal of R."""
    A = torch.randn(5, 1, dtype=torch.float64).expand(5, 3).clone().requires_grad_()
    B = torch.randn(3, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad(FactoredMatrix(A, B).norm(), A)
    (expected,) = torch.autograd.grad((A @ B).norm(), A)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_decomposition_made_without_gradients_is_not_remembered_for_one_with():
    A, B = random_factors((), 4, 2, 3)
    matrix = FactoredMatrix(A, B)
    with torch.no_grad():
        _ = matrix.S
    assert matrix.S.requires_grad
    constant = FactoredMatrix(A.detach(), B.detach())
    with torch.inference_mode():
        _ = constant.S
    (constant.S * A[0, 0]).sum().backward()
    torch.testing.assert_close(A.grad[0, 0], constant.S.sum())


def test_half_precision_factors_have_gradients_in_their_dtype():
    A, B = (factor.detach().bfloat16().requires_grad_() for factor in random_factors((), 5, 2, 4))
    FactoredMatrix(A, B).norm().backward()
    wide = A.detach().double().requires_grad_()
    (wide @ B.detach().double()).norm().backward()
    assert A.grad.dtype == torch.bfloat16
    # The norm and its gradient are each rounded to 8 bits, the gradient once more on its way.
    torch.testing.assert_close(A.grad.double(), wide.grad, rtol=2**-7, atol=2**-9)


def test_right_factor_without_gradients_makes_no_orthogonal_factor():
    matrix = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert not right_factor(matrix).requires_grad
    torch.testing.assert_close(right_factor(matrix).abs(), torch.linalg.qr(matrix, mode="r").R.abs(), **CLOSE)


def dense_scores(W_Q, W_K, W_V, W_O, mode):
    group = W_Q.shape[1] // W_K.shape[1]
    W_K, W_V = W_K.repeat_interleave(group, 1), W_V.repeat_interleave(group, 1)
    OV, QK = W_V @ W_O, W_Q @ W_K.mT
    reader = {"Q": QK, "K": QK.mT, "V": OV}[mode]
    norms = OV.norm(dim=(-2, -1))[:, :, None, None] * reader.norm(dim=(-2, -1))
    products = torch.einsum("aiwx,bjxy->aibjwy", OV, reader).square().sum((-2, -1)).sqrt()
    later = torch.arange(len(W_Q))[:, None] < torch.arange(len(W_Q))
    return products / norms * later[:, None, :, None]


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_have_the_gradients_of_the_dense_formula(mode):
    """They could not be differentiated at all."""
    sizes = {"W_Q": (3, 4, 6, 2), "W_K": (3, 2, 6, 2), "W_V": (3, 2, 6, 2), "W_O": (3, 4, 2, 6)}
    weights = {name: torch.randn(*size, dtype=torch.float64, requires_grad=True) for name, size in sizes.items()}
    scores, expected = all_composition_scores(**weights, mode=mode), dense_scores(**weights, mode=mode)
    torch.testing.assert_close(scores, expected, **CLOSE)
    mix = torch.randn_like(scores)
    found = torch.autograd.grad((scores * mix).sum(), list(weights.values()), allow_unused=True)
    wanted = torch.autograd.grad((expected * mix).sum(), list(weights.values()), allow_unused=True)
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, dense, **CLOSE)


def test_composition_with_a_zero_head_leaves_finite_gradients():
    """Zero over zero was kept out of the scores and stayed in their gradients."""
    weights = {name: torch.randn(2, 2, 5, 2, dtype=torch.float64) for name in ("W_Q", "W_K", "W_V")}
    weights["W_O"] = torch.randn(2, 2, 2, 5, dtype=torch.float64)
    for name in ("W_V", "W_Q", "W_O"):
        weights[name][:, 0] = 0
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    for mode in ("Q", "K", "V"):
        grads = torch.autograd.grad(
            all_composition_scores(**weights, mode=mode).sum(), list(weights.values()), allow_unused=True
        )
        assert all(grad is None or grad.isfinite().all() for grad in grads)
    left, right = random_factors((), 4, 2, 4), random_factors((), 4, 3, 4)
    assert torch.autograd.gradcheck(
        lambda *parts: composition_scores(FactoredMatrix(*parts[:2]), FactoredMatrix(*parts[2:])), (*left, *right)
    )
