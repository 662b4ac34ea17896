"""Decompositions of a product of two factors, computed from the factors and differentiable.

A function of `A` that no rotation from the left changes (a norm of `A B`, its singular values) is a function of
`A^T A`, and so of the small triangular factor of `A = Q R`. To first order `R` moves by `Q^T dA`: what `dA` has outside
the columns of `Q` changes `A^T A` in second order only. So the gradient of such a function is `Q` times its gradient
to `R`, for wide, dependent and zero `A` as well, where the derivative of a QR decomposition itself is not defined.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from hooklens.precision import widen


def right_factor(matrix: Float[Tensor, "*leading rows columns"]) -> Float[Tensor, "*leading rank columns"]:
    """The triangular `R` of `matrix = Q R`: a small matrix with the same norms and singular values.

    Gradients are those of functions that a rotation of `R` from the left does not change. They have none themselves.
    """
    wide = widen(matrix)
    factor: Tensor
    if torch.is_grad_enabled() and wide.requires_grad:
        factor = _RightFactor.apply(wide)  # type: ignore[no-untyped-call]
    else:
        factor = torch.linalg.qr(wide, mode="r").R
    return factor


class _RightFactor(torch.autograd.Function):
    """`R` of `matrix = Q R`; see the module for its gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factors = torch.linalg.qr(matrix)
        ctx.save_for_backward(factors.Q)
        R: Tensor = factors.R
        return R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _rotate_back(ctx, *gradients)


@once_differentiable
def _rotate_back(ctx: Any, grad_R: Tensor) -> Tensor:
    Q: Tensor = ctx.saved_tensors[0]
    return Q @ grad_R


def product_svd(
    A: Float[Tensor, "*leading left inner"], B: Float[Tensor, "*leading inner right"]
) -> tuple[Float[Tensor, "*leading left rank"], Float[Tensor, "*leading rank"], Float[Tensor, "*leading right rank"]]:
    """`(U, S, V)` with `A B = U diag(S) V^T`, singular values descending; at least in float32.

    Computed from `A = Q_A R_A` and `B^T = Q_B R_B` as the decomposition of the small `R_A R_B^T`. Singular values have
    a gradient everywhere (one of several where they coincide or are zero); singular vectors have one only where their
    values are distinct and not zero, and elsewhere it is not finite.
    """
    U, S, V = _ProductSvd.apply(widen(A), widen(B))  # type: ignore[no-untyped-call]
    return U, S, V


class _ProductSvd(torch.autograd.Function):
    """The decomposition of a product of known rank, in terms of its factors.

    With `X = A B`, `a = skew(U^T dU)` and `b = skew(V^T dV)` of the incoming gradients, skew(m) = m - m^T, the gradient
    to `X` is `U M V^T + P V^T + U T^T` (Townsend 2016, "Differentiating the singular value decomposition"), where

        M_ij = (a_ij s_j + s_i b_ij) / (s_j^2 - s_i^2),  M_ii = dS_i,
        P = (1 - U U^T) dU / S,  T = (1 - V V^T) dV / S.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Q_A, R_A = torch.linalg.qr(A)
        Q_B, R_B = torch.linalg.qr(B.mT)
        U_small, S, V_small = torch.linalg.svd(R_A @ R_B.mT, full_matrices=False)
        U, V = Q_A @ U_small, Q_B @ V_small.mT
        ctx.save_for_backward(A, B, U, S, V)
        return U, S, V

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        grad_U, grad_S, grad_V = gradients
        A, B, U, S, V = ctx.saved_tensors
        row, column = S[..., :, None], S[..., None, :]
        turns = _skew(U.mT @ grad_U) * column + row * _skew(V.mT @ grad_V)
        core = _divide_unless_zero(turns, column.square() - row.square()) + torch.diag_embed(grad_S)
        outside_U = _divide_unless_zero(grad_U - U @ (U.mT @ grad_U), column)
        outside_V = _divide_unless_zero(grad_V - V @ (V.mT @ grad_V), column)
        left = U @ core + outside_U
        grad_A = left @ (B @ V).mT + U @ (B @ outside_V).mT
        grad_B = (A.mT @ left) @ V.mT + (A.mT @ U) @ outside_V.mT
        return grad_A, grad_B


def _skew(matrix: Tensor) -> Tensor:
    return matrix - matrix.mT


def _divide_unless_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 / 0 is 0: what asks for no gradient of the vectors gets none, whatever the values are."""
    return numerator / torch.where(numerator == 0, 1, denominator)
