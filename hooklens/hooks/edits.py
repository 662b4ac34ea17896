"""Edits as values: what to change, where, and at which tokens.

An edit names a hook point (or several, by anything that selects names) and, where that applies, token
positions, heads and rows. It is immutable, can be compared, printed, listed, and reused; models accept edits
wherever they accept hooks.

Positions are token positions: 0 is a row's first real token, whatever padding stands around it and however
much of the sequence already lies in a key-value cache; negative positions count from the row's last real
token. Tokens that are not part of the current call are left alone.

Under grouped queries several query heads read one key-value head. `head` counts the heads that the tensor has,
which are key-value heads at `hook_k` and `hook_v`; `query_head` changes what single query heads read there.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hooklens.arguments import read_function
from hooklens.errors import EditError
from hooklens.hooks.call import Form, HookFunction, call_in_form, read_form
from hooklens.hooks.edit import Edit
from hooklens.hooks.region import Selection
from hooklens.precision import widen

__all__ = [
    "Add",
    "Custom",
    "Edit",
    "Interchange",
    "Mean",
    "Project",
    "Replace",
    "Scale",
    "SetComponents",
    "Zero",
    "exchange",
]


@dataclass(frozen=True)
class Replace(Edit):
    """Put `value` in the place of the activation.

    Example:
        `Replace("blocks.3.hook_resid_pre", clean_cache["resid_pre", 3][:, -1], pos=-1)`
    """

    reach = "token"
    lays = "value"
    computes: ClassVar[bool] = False

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The value, laid over the region: a copy, so that nothing that happens to the activation reaches the value."""
        return selection.lay_over(self.value, region, region_axes).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Add(Edit):
    """Add `value` to the activation, as in activation steering."""

    reach = "token"
    lays = "value"

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region plus the value."""
        return region + selection.lay_over(self.value, region, region_axes)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the activation by `factor`."""

    reach = "token"

    factor: float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region times the factor."""
        return region * self.factor


@dataclass(frozen=True)
class Zero(Edit):
    """Set the activation to zero."""

    reach = "token"

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """Zeros."""
        return torch.zeros_like(region)


@dataclass(frozen=True)
class Mean(Edit):
    """Replace the activation by its mean over the tokens (rows and positions) the edit selects.

    Padding neither counts nor changes, at points whose axes are known. At a point of another kind the mean is over its
    first axis.
    """

    reach = "row"
    counts_padding: ClassVar[bool] = False

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The mean over tokens, for every token."""
        axes = [i for i, axis in enumerate(region_axes) if axis in ("token", "batch", "pos", "query")]
        return region.mean(dim=axes or [0], keepdim=True).expand_as(region)


@dataclass(frozen=True)
class Project(Edit):
    """Remove the span of `directions` from the activation's last axis, or keep nothing but it.

    Directions need be neither normalised, orthogonal nor independent. They count as dependent up to the rounding of
    their own dtype: with each at length 1, what the singular value decomposition gives below `k` times the dtype's
    epsilon of the largest singular value is no direction of the span. A zero direction adds nothing to it, so that
    zeros alone remove nothing. Only the span matters, so directions may have another dtype or device than the
    activation. The projection is computed at least in float32 and rounded once.

    Attributes:
        directions: `[d]` or `[k d]`.
        keep: False removes the span (directional ablation), True removes everything else.
    """

    reach = "token"

    directions: Tensor
    keep: bool = False

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region with or without its part in the span.

        Raises:
            EditError: the directions have another shape, are not finite, or are no tensor of real numbers.
        """
        wide = widen(region)
        basis = self._basis(region.shape[-1], selection.subject).to(wide.device, wide.dtype)
        inside: Tensor = (wide @ basis) @ basis.T
        return (inside if self.keep else wide - inside).to(region.dtype)

    def _basis(self, size: int, subject: str) -> Tensor:
        """An orthonormal basis of the span, `[d rank]` in float64, with gradients to the directions.

        How the directions are combined is held constant and orthonormalised once more: that has the gradient of the
        span, where the derivative of singular vectors is not finite for equal values, as of orthogonal directions.
        """
        given = self.directions
        if not isinstance(given, Tensor) or given.is_complex() or given.dtype == torch.bool:
            found = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise EditError(f"{subject}: directions are {found}; expected a tensor of real numbers")
        if given.ndim not in (1, 2) or given.shape[-1] != size:
            raise EditError(f"{subject}: directions have shape {list(given.shape)}; expected [{size}] or [k, {size}]")
        rows = given.reshape(-1, size).double()
        largest = rows.detach().abs().amax(-1, keepdim=True)
        if not largest.isfinite().all():
            bad = (~largest.isfinite()).nonzero()[:, 0].tolist()
            raise EditError(f"{subject}: directions {bad} hold NaN or infinity; expected finite numbers")
        # By the largest entry first: squares of very large or very small numbers have no room in a float64.
        rows = rows[largest[:, 0] > 0] / largest[largest[:, 0] > 0]
        rows = rows / rows.detach().norm(dim=-1, keepdim=True)
        U, S, _ = torch.linalg.svd(rows.detach(), full_matrices=False)
        own = torch.finfo(given.dtype if given.is_floating_point() else torch.float64).eps
        # The decomposition itself rounds, too.
        threshold = max(len(rows) * own, max(rows.shape) * torch.finfo(torch.float64).eps)
        rank = int((S / S[:1] > threshold).sum())
        basis: Tensor = torch.linalg.qr(rows.T @ (U[:, :rank] / S[:rank])).Q
        return basis


@dataclass(frozen=True)
class SetComponents(Edit):
    """Set what some directions read of the activation to given values, by moving it along directions of their own.

    `x + (values - x R^T) W`, where the rows of `R` read and those of `W` are moved along. With `W = pinv(R)^T`, the
    default, that is the smallest change after which `x R^T` is `values`: clamping a component. Other writers make other
    affine maps, such as the least change in expectation that hides a concept (LEACE, Belrose et al. 2023). It is
    computed at least in float32 and rounded once; the tensors may have another dtype or device than the activation.

    Attributes:
        readers: `[d]` or `[k d]`.
        values: what they are to read: a number for all, or `[k]`.
        writers: `[d]` or `[k d]`; None: the pseudo-inverse of the readers, which must be independent.

    Example:
        `SetComponents("blocks.3.hook_resid_pre", direction / direction.norm(), 4.0)`
    """

    readers: Tensor
    values: Tensor | float
    _: KW_ONLY
    writers: Tensor | None = None

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region moved so that the readers read the values.

        Raises:
            EditError: readers, writers or values have another shape, are not finite, or are no real numbers; or readers
                without writers depend on each other, so that they cannot all be given values.
        """
        wide, subject = widen(region), selection.subject
        readers = _read_rows(self.readers, region.shape[-1], subject=subject, what="readers")
        values = self._read_values(len(readers), subject).to(wide.device, wide.dtype)
        if self.writers is None:
            if int(torch.linalg.matrix_rank(readers)) < len(readers):
                raise EditError(
                    f"{subject}: the {len(readers)} readers depend on each other, so no change gives them any values; "
                    "leave out those that follow from others, or give writers"
                )
            writers = torch.linalg.pinv(readers).T
        else:
            writers = _read_rows(self.writers, region.shape[-1], subject=subject, what="writers")
            if len(writers) != len(readers):
                raise EditError(f"{subject}: {len(writers)} writers for {len(readers)} readers; expected one for each")
        away = values - wide @ readers.to(wide.device, wide.dtype).T
        moved: Tensor = wide + away @ writers.to(wide.device, wide.dtype)
        return moved.to(region.dtype)

    def _read_values(self, n_readers: int, subject: str) -> Tensor:
        given = self.values
        if not isinstance(given, Tensor):
            return torch.full((n_readers,), float(given), dtype=torch.float64)
        if given.is_complex() or given.dtype == torch.bool or given.shape not in ((), (n_readers,)):
            raise EditError(
                f"{subject}: values are {given.dtype} {list(given.shape)}; expected a number or [{n_readers}] of them"
            )
        if not bool(given.isfinite().all()):
            raise EditError(f"{subject}: values hold NaN or infinity; expected finite numbers")
        return given.double().expand(n_readers)


def _read_rows(given: object, size: int, *, subject: str, what: str) -> Tensor:
    """Directions as rows in float64.

    Raises:
        EditError: another shape, or no finite real numbers.
    """
    if not isinstance(given, Tensor) or given.is_complex() or given.dtype == torch.bool:
        found = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise EditError(f"{subject}: {what} are {found}; expected a tensor of real numbers")
    if given.ndim not in (1, 2) or given.shape[-1] != size:
        raise EditError(f"{subject}: {what} have shape {list(given.shape)}; expected [{size}] or [k, {size}]")
    if not bool(given.isfinite().all()):
        raise EditError(f"{subject}: {what} hold NaN or infinity; expected finite numbers")
    return given.reshape(-1, size).double()


@dataclass(frozen=True)
class Custom(Edit):
    """Any other change, as a function.

    The function has any of the forms that hooks have: `fn(tensor)`, `fn(tensor, hook)` or `fn(tensor, *, hook)`, where
    `hook` is the hook point. One that could be called either way, as `fn(tensor, scale=2)`, is given the tensor alone.

    Attributes:
        fn: from the tokens and heads selected (`[token ...]`; the whole tensor when nothing is selected) to new
            values of the same shape; None keeps the tensor, or what the function has written into it.

    Raises:
        EditError: `fn` is no function, or takes other arguments.
    """

    computes: ClassVar[bool] = False

    fn: HookFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"{self._subject()}: fn"
        fn = read_function(self.fn, what=what, expected="a function fn(tensor) or fn(tensor, hook)", error=EditError)
        form = read_form(fn, else_form="tensor", what=what, error=EditError)
        # Beside the fields: it follows from them.
        object.__setattr__(self, "_form", form)

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """What `fn` makes of the region."""
        form: Form = self._form  # type: ignore[attr-defined]
        returned: Any = call_in_form(self.fn, form, region, selection.point)
        if returned is None:
            return region
        if not isinstance(returned, Tensor) or returned.shape != region.shape or returned.dtype != region.dtype:
            found = (
                f"shape {list(returned.shape)}, {returned.dtype}"
                if isinstance(returned, Tensor)
                else f"a {type(returned).__name__}"
            )
            raise EditError(
                f"{selection.subject}: fn returned {found}; expected {region_axes} of shape {list(region.shape)}, "
                f"{region.dtype}"
            )
        return returned


@dataclass(frozen=True)
class Interchange(Edit):
    """Exchange the part of the activation that lies in a subspace for that of `source`, and leave the rest.

    An interchange intervention (Geiger et al. 2021, "Causal Abstractions of Neural Networks"), in a distributed basis
    (Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations"): `x + (source - x) B^T diag(shares) B`, where the rows of `B` are orthonormal. Several in
    orthogonal subspaces do not touch each other, in any order. It is computed at least in float32 and rounded once;
    where the source is the activation itself nothing changes, bit for bit.

    Attributes:
        basis: `[k d]`, orthonormal rows; another dtype or device than the activation's is brought there.
        source: the activation of another run, laid over the region as the value of `Replace` is.
        shares: `[k]`, how much of each direction is exchanged, as boundless DAS trains them (Wu et al. 2023,
            "Interpretability at Scale"); None: all of it.

    Example:
        `Interchange("blocks.3.hook_resid_pre", basis, source_cache["resid_pre", 3][:, -1], pos=-1)`
    """

    reach = "token"
    lays = "source"

    basis: Tensor
    source: Tensor | float
    shares: Tensor | None = None

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region with the source's part in the subspace.

        Raises:
            EditError: the basis or the shares have another shape, are no real numbers, or the rows are not orthonormal.
        """
        self._check(region.shape[-1], selection.subject)
        return exchange(region, selection.lay_over(self.source, region, region_axes), self.basis, self.shares)

    def _check(self, size: int, subject: str) -> None:
        given, shares = self.basis, self.shares
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape[1:] != (size,):
            found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise EditError(f"{subject}: basis is {found}; expected a tensor [k, {size}] of real numbers")
        if shares is not None and (not isinstance(shares, Tensor) or shares.shape != given.shape[:1]):
            found = f"{list(shares.shape)}" if isinstance(shares, Tensor) else f"a {type(shares).__name__}"
            raise EditError(f"{subject}: shares are {found}; expected a tensor [{len(given)}], one for each direction")
        rows = given.detach().double()
        products = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        # Rows are often computed in float32, whatever their dtype, and rounding them moves products by its epsilon.
        if not bool((products.abs() <= max(1e-5, 4 * torch.finfo(given.dtype).eps)).all()):
            raise EditError(
                f"{subject}: the rows of basis are not orthonormal (products are off by up to "
                f"{float(products.abs().max()):.1e}); torch.linalg.qr(basis.T).Q.T makes them so"
            )


def exchange(here: Tensor, there: Tensor, basis: Tensor, shares: Tensor | None = None) -> Tensor:
    """Vectors `[... d]` with the part of others in the span of orthonormal rows `[k d]`, in their own dtype."""
    wide = widen(here)
    rows = basis.to(wide.device, wide.dtype)
    inside = (widen(there) - wide) @ rows.T
    if shares is not None:
        inside = inside * shares.to(wide.device, wide.dtype)
    return (wide + inside @ rows).to(here.dtype)
