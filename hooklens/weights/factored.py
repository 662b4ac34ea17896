"""Low-rank matrices kept as the product of two factors, and what can be read off them cheaply.

A circuit of an attention head, `W_Q W_K^T` or `W_V W_O` (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"), is a d_model x d_model matrix of rank d_head; followed by an embedding on each side
it is d_vocab x d_vocab. `FactoredMatrix` holds `A [left, inner]` and `B [inner, right]` and computes norms,
singular values and eigenvalues from matrices of size inner x inner. Nothing of size left x right is made
unless `AB` is asked for.
"""

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import SupportsIndex, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from hooklens.display import Displayed, Summary, format_bytes, format_shape
from hooklens.errors import InputError
from hooklens.precision import widen
from hooklens.weights.decompositions import product_svd, right_factor

LeadingIndex: TypeAlias = SupportsIndex | slice | EllipsisType | Tensor | Sequence[int] | None


class FactoredMatrix(Displayed):
    """The matrix `A B`, or a batch of them over leading axes, held as its two factors.

    The leading axes of the factors broadcast. Results of decompositions have the dtype of the factors;
    half-precision factors are decomposed in float32 and the result is rounded once. Factors are not to be
    edited in place: the decomposition is remembered.

    Attributes:
        A: left factor `[... left inner]`.
        B: right factor `[... inner right]`.
        shape: shape of the product, `[... left right]`.
        ldim, mdim, rdim: the sizes of left, inner and right.

    Example:
        >>> OV = FactoredMatrix(W_V, W_O)  # [n_heads, d_model, d_model], nothing multiplied yet
        >>> OV[3].eigenvalues  # [d_head]
    """

    def __init__(self, A: Float[Tensor, "..."], B: Float[Tensor, "..."]) -> None:
        """Wrap two factors; no arithmetic is done.

        Raises:
            InputError: the factors are not matrices, their inner sizes differ, or leading axes do not broadcast.
        """
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(
                f"FactoredMatrix: the factors have shapes {tuple(A.shape)} and {tuple(B.shape)}; "
                "expected [..., left, inner] and [..., inner, right] with equal inner sizes"
            )
        leading = broadcast_leading(A.shape[:-2], B.shape[:-2], subject="FactoredMatrix")
        self.A = A.broadcast_to((*leading, *A.shape[-2:]))
        self.B = B.broadcast_to((*leading, *B.shape[-2:]))
        self.ldim, self.mdim = A.shape[-2:]
        self.rdim = B.shape[-1]
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self._remembered_svd: tuple[Tensor, Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={tuple(self.shape)}, inner={self.mdim}, dtype={self.A.dtype})"

    def _summary(self) -> Summary:
        factors = (("A", self.A), ("B", self.B))
        whole = self.shape.numel() * self.A.element_size()
        return Summary(
            title=repr(self),
            facts={
                **{
                    name: f"{format_shape(one.shape)}, {format_bytes(one.numel() * one.element_size())}"
                    for name, one in factors
                },
                "product": f"{format_shape(self.shape)}, {format_bytes(whole)} where .AB makes it",
                "device": str(self.A.device),
            },
        )

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return len(self.shape)

    @property
    def has_leading_dims(self) -> bool:
        """Whether this is a batch of matrices."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Float[Tensor, "*leading left inner"], Float[Tensor, "*leading inner right"]]:
        """Both factors."""
        return self.A, self.B

    @property
    def T(self) -> "FactoredMatrix":  # noqa: N802
        """The transpose of each matrix, `B^T A^T`; leading axes stay where they are."""
        return type(self)(self.B.mT, self.A.mT)

    def transpose(self) -> "FactoredMatrix":
        """The same as `T`."""
        return self.T

    @property
    def AB(self) -> Float[Tensor, "*leading left right"]:  # noqa: N802
        """The product. It has left x right entries: large where these are d_model or d_vocab."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*leading inner inner"]:  # noqa: N802
        """The product in reverse order, which has the non-zero eigenvalues of `AB`.

        Raises:
            InputError: the matrix is not square.
        """
        self._require_square()
        return self.B @ self.A

    def _require_square(self) -> None:
        if self.ldim != self.rdim:
            raise InputError(
                f"BA and eigenvalues need a square matrix; this one is {self.ldim} x {self.rdim}. "
                "The singular values S exist for any shape"
            )

    def svd(
        self,
    ) -> tuple[
        Float[Tensor, "*leading left rank"], Float[Tensor, "*leading rank"], Float[Tensor, "*leading right rank"]
    ]:
        """`(U, S, Vh)` with `AB = U diag(S) Vh^T`, singular values in descending order.

        As in TransformerLens the columns of `Vh [right, rank]` are the right singular vectors: it is the
        transpose of what `torch.linalg.svd` calls `Vh`. `rank` is min(left, inner, right).

        Singular values have gradients everywhere; singular vectors where their values are distinct and not zero.
        """
        if self._remembered_svd is not None:
            return self._remembered_svd
        U, S, V = (part.to(self.A.dtype) for part in product_svd(self.A, self.B))
        # A remembered autograd graph could be walked backwards only once, and without one there are no gradients later.
        if not (self.A.requires_grad or self.B.requires_grad or torch.is_inference_mode_enabled()):
            self._remembered_svd = U, S, V
        return U, S, V

    @property
    def U(self) -> Float[Tensor, "*leading left rank"]:  # noqa: N802
        """Left singular vectors, as columns."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*leading rank"]:  # noqa: N802
        """Singular values, descending."""
        return self.svd()[1]

    @property
    def Vh(self) -> Float[Tensor, "*leading right rank"]:  # noqa: N802
        """Right singular vectors, as columns (see `svd`)."""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Complex[Tensor, "*leading inner"]:
        """Eigenvalues of a square matrix, those of `BA`: `AB` has the same ones and otherwise zeros.

        Each has a gradient where it is unlike the others.

        Raises:
            InputError: the matrix is not square.
        """
        self._require_square()
        values: Tensor = torch.linalg.eigvals(widen(self.B) @ widen(self.A))
        return values

    def norm(self) -> Float[Tensor, "*leading"]:
        """Frobenius norm of each matrix, `||R_A R_B^T||` with the triangular factors of `A` and `B^T`.

        Its gradient at a zero matrix is zero; its gradient has no gradient.
        """
        core = right_factor(self.A) @ right_factor(self.B.mT).mT
        norm: Tensor = torch.linalg.matrix_norm(core).to(self.A.dtype)
        return norm

    def make_even(self) -> "FactoredMatrix":
        """The same matrix as `(U sqrt(S)) (sqrt(S) Vh^T)`: both factors orthogonal and equally large."""
        U, S, Vh = self.svd()
        root = S.sqrt()
        return type(self)(U * root[..., None, :], root[..., :, None] * Vh.mT)

    def collapse_l(self) -> Float[Tensor, "*leading rank right"]:
        """`diag(S) Vh^T`: the matrix without its left orthogonal factor; equal norms and inner products of columns."""
        _, S, Vh = self.svd()
        return S[..., :, None] * Vh.mT

    def collapse_r(self) -> Float[Tensor, "*leading left rank"]:
        """`U diag(S)`: the matrix without its right orthogonal factor; equal norms and inner products of rows."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    def get_corner(self, k: int = 3) -> Float[Tensor, "..."]:
        """The first `k` entries along every axis of the product, for a look at it."""
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[leading][..., :k, :] @ self.B[leading][..., :k]

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """A leading axis of size 1 put in at `k`; negative `k` counts from the end as in `torch.unsqueeze`.

        Raises:
            InputError: `k` lies within or past the two axes of the matrix.
        """
        position = k if k >= 0 else k + self.ndim + 1
        if not 0 <= position <= self.ndim - 2:
            raise InputError(
                f"unsqueeze({k}): a FactoredMatrix of shape {tuple(self.shape)} takes a new axis "
                f"at 0 to {self.ndim - 2}, before the axes of the matrix"
            )
        return type(self)(self.A.unsqueeze(position), self.B.unsqueeze(position))

    def __getitem__(self, index: LeadingIndex | tuple[LeadingIndex, ...]) -> "FactoredMatrix":
        """Index leading axes as a tensor would be; then rows, then columns.

        Rows and columns are indexed independently of each other, by an int, a slice or a list of ints. An int
        keeps the axis with size 1, so that the result is a matrix still.

        Raises:
            InputError: more indices than axes, or an index on rows or columns of another kind.
        """
        parts = self._expand_ellipsis(index if isinstance(index, tuple) else (index,))
        split, taken = 0, 0
        while split < len(parts) and (taken < self.ndim - 2 or parts[split] is None):
            taken += _axes_taken(parts[split])
            split += 1
        leading, matrix = parts[:split], parts[split:]
        left, right = (self.A[leading], self.B[leading]) if leading else (self.A, self.B)
        if matrix:
            left = left[..., _matrix_index(matrix[0], self.ldim, "row"), :]
        if len(matrix) > 1:
            right = right[..., _matrix_index(matrix[1], self.rdim, "column")]
        return type(self)(left, right)

    def _expand_ellipsis(self, parts: tuple[LeadingIndex, ...]) -> tuple[LeadingIndex, ...]:
        given = sum(map(_axes_taken, parts))
        places = [place for place, part in enumerate(parts) if isinstance(part, EllipsisType)]
        if given > self.ndim or len(places) > 1:
            raise InputError(
                f"index {parts} does not fit a FactoredMatrix of shape {tuple(self.shape)}: "
                f"expected at most {self.ndim} indices and one ellipsis"
            )
        if not places:
            return parts
        filled = (slice(None),) * (self.ndim - given)
        return (*parts[: places[0]], *filled, *parts[places[0] + 1 :])

    @overload
    def __matmul__(self, other: Tensor) -> "FactoredMatrix | Tensor": ...
    @overload
    def __matmul__(self, other: "FactoredMatrix") -> "FactoredMatrix": ...
    def __matmul__(self, other: "Tensor | FactoredMatrix") -> "FactoredMatrix | Tensor":
        """The product with a matrix on the right, factored again with the smaller inner size; with a vector, a tensor.

        Raises:
            InputError: the sizes do not match.
        """
        if isinstance(other, FactoredMatrix):
            self._check_product(self.shape, other.shape)
            product = self._times_matrix(other.A)
            return product._times_matrix(other.B)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            self._check_product(self.shape, (*other.shape, 1))
            return (self.A @ (self.B @ other[:, None])).squeeze(-1)
        self._check_product(self.shape, other.shape)
        return self._times_matrix(other)

    def __rmatmul__(self, other: Tensor) -> "FactoredMatrix | Tensor":
        """The product with a matrix on the left, factored again; with a vector, a tensor.

        Raises:
            InputError: the sizes do not match.
        """
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            self._check_product((1, *other.shape), self.shape)
            return ((other[None, :] @ self.A) @ self.B).squeeze(-2)
        self._check_product(other.shape, self.shape)
        return self.T._times_matrix(other.mT).T

    def _times_matrix(self, other: Float[Tensor, "*#leading right new_right"]) -> "FactoredMatrix":
        # When the right side is the narrower one, AB is no larger than A.
        return type(self)(self.A, self.B @ other) if self.rdim > self.mdim else type(self)(self.AB, other)

    @staticmethod
    def _check_product(left: Sequence[int], right: Sequence[int]) -> None:
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise InputError(
                f"cannot multiply matrices of shapes {tuple(left)} and {tuple(right)}: "
                "expected [..., left, n] and [..., n, right]"
            )
        broadcast_leading(left[:-2], right[:-2], subject="matrix product")

    def __mul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        """The matrix times one number.

        Raises:
            InputError: a tensor with more than one entry; use `@` for matrix products.
        """
        if isinstance(scalar, Tensor):
            if scalar.numel() != 1:
                raise InputError(
                    f"FactoredMatrix * tensor of shape {tuple(scalar.shape)}: expected a single number; "
                    "use @ for a matrix product"
                )
            scalar = scalar.reshape(())
        elif not isinstance(scalar, int | float):
            return NotImplemented
        return type(self)(self.A * scalar, self.B)

    def __rmul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        """One number times the matrix."""
        return self * scalar


def broadcast_leading(left: Sequence[int], right: Sequence[int], *, subject: str) -> tuple[int, ...]:
    """The common shape of two lists of leading axes.

    Raises:
        InputError: they do not broadcast; `subject` opens the message.
    """
    try:
        return np.broadcast_shapes(tuple(left), tuple(right))
    except ValueError as error:
        raise InputError(
            f"{subject}: leading axes {tuple(left)} and {tuple(right)} do not broadcast; expected equal sizes "
            "or 1, counted from the right (unsqueeze puts an axis of size 1 in)"
        ) from error


def _axes_taken(part: LeadingIndex) -> int:
    """How many axes an index consumes: none for a new axis, all its own for a boolean mask."""
    if part is None or isinstance(part, EllipsisType):
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _matrix_index(part: LeadingIndex, size: int, axis: str) -> slice | Tensor | list[int]:
    if isinstance(part, bool) or part is None or isinstance(part, EllipsisType):
        raise InputError(f"{axis} index {part!r}: expected an int, a slice or a list of ints")
    if isinstance(part, slice):
        return part
    if isinstance(part, Tensor):
        if part.ndim != 1:
            raise InputError(f"{axis} index has shape {tuple(part.shape)}: expected an int, a slice or a list of ints")
        return part
    if isinstance(part, SupportsIndex):
        position = operator.index(part)
        if not -size <= position < size:
            raise InputError(f"{axis} index {position} is out of range for {size} {axis}s")
        return slice(position % size, position % size + 1)
    return list(part)
