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

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hooklens.errors import EditError
from hooklens.hooks.call import TokenIndex
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.hooks.region import Region, Selection, axes_in_canonical_order, choose_tokens, query_head_hint
from hooklens.hooks.values import TensorValue
from hooklens.precision import widen


@dataclass(frozen=True)
class Edit(TensorValue, ABC):
    """Base of all edits; a new kind is a frozen dataclass that defines `compute`.

    Edits of one kind with equal fields are equal: tensors by their entries, functions by identity.

    Attributes:
        name: the hook point, or any filter that selects hook points.
        pos: token positions to edit; None: all.
        head: heads to edit, for tensors with a head axis; None: all. Key-value heads where the tensor has those.
        query_head: the same, always counted in query heads. At `hook_k` and `hook_v` of a network with grouped
            queries the edit acts at `hook_k_per_head` and `hook_v_per_head`, so on what these query heads read; the
            other query heads of their group read on as before.
        rows: rows of the batch to edit; None: all.
        when: while generating, act on the prompt (`"prefill"`), on new tokens (`"decode"`) or on both.

    Positions, heads and rows are each an int, a slice, or a list, array or tensor of ints.
    """

    # Whether padding counts where no positions are chosen.
    counts_padding: ClassVar[bool] = True
    # Whether it computes with the activation, which nobody can do with numbers that name something.
    computes: ClassVar[bool] = True
    # What the new value of a token is made of: "token", of this token alone (and of what is laid over it); "row",
    # of all tokens of its row; "unknown", of more than this class can say, such as what a function remembers.
    reach: ClassVar[str] = "unknown"
    # The field that is laid over the region, where there is one.
    lays: ClassVar[str | None] = None

    name: NamesFilter
    _: KW_ONLY
    pos: Choice = None
    head: Choice = None
    query_head: Choice = None
    rows: Choice = None
    when: Literal["all", "prefill", "decode"] = "all"

    def __post_init__(self) -> None:
        if self.when not in ("all", "prefill", "decode"):
            raise EditError(f"{self._subject()}: when is {self.when!r}; expected 'all', 'prefill' or 'decode'")
        if self.head is not None and self.query_head is not None:
            raise EditError(
                f"{self._subject()}: head={self.head!r} and query_head={self.query_head!r} both choose heads; give one "
                "of them"
            )
        for field in ("pos", "head", "query_head", "rows"):
            self._read(field)

    def _read(self, field: str) -> Index:
        return read_choice(getattr(self, field), what=f"{self._subject()}: {field}", error=EditError)

    @abstractmethod
    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The new values of a region, in the region's shape.

        Args:
            region: the tokens and heads this edit touches. Its first axis, `token`, runs over the pairs of
                row and position when the edit selects any of them; otherwise axes are the hook point's own.
            region_axes: the names of the region's axes.
            selection: which rows, positions and heads the region holds.
        """

    def apply(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Tensor | None:
        """The edited tensor, out of place; None when the edit has nothing to do in this call.

        Raises:
            EditError: the edit's positions, heads, rows or value do not fit the tensor.
        """
        if tokens is not None and self.when not in ("all", tokens.phase):
            return None
        self.check_computable(point)
        chooses = not (self.pos is None and self._heads is None and self.rows is None)
        is_unpadded = tokens is None or tokens.positions_by_column is not None
        if not chooses and (self.counts_padding or is_unpadded or point.site is None):
            site, name = point.site, point.name or ""
            axes = site.axes if site is not None else tuple(f"axis {i}" for i in range(tensor.ndim))
            whole = Selection(subject=self._subject(name), tensor_shape=tuple(tensor.shape), n_rows=tensor.shape[0])
            return self.compute(tensor, axes, whole)
        return self._apply_to_region(tensor, point, tokens)

    def check_computable(self, point: HookPoint) -> None:
        """Refuse arithmetic with numbers that name something.

        Raises:
            EditError: the point holds such numbers, and the edit computes with them.
        """
        if self.computes and point.site is not None and point.site.discrete:
            raise EditError(
                f"{self._subject(point.name)}: the numbers there name something ({point.site.description}), so none is "
                "more than another; use Replace or Custom"
            )

    def _apply_to_region(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Tensor | None:
        region = self.find_region(tensor, point, tokens)
        if region is None:
            return None
        canonical = tensor.permute(region.order)
        edited = canonical.clone()
        edited[region.index] = self.compute(canonical[region.index], region.axes, region.selection)
        return edited.permute([region.order.index(i) for i in range(len(region.order))])

    def find_region(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Region | None:
        """The part of a tensor that the edit touches; None where this call runs no token of it.

        Args:
            tensor: what passes the point; its entries are not read.
            point: the hook point.
            tokens: which tokens the columns are; None: token `i` stands in column `i`.

        Raises:
            EditError: the edit's positions, heads or rows do not fit the tensor, or its axes are not known.
        """
        subject = self._subject(point.name)
        if point.site is None:
            raise EditError(
                f"{subject}: the axes of this point are not known, so no positions, heads or rows can be "
                "chosen; use edits.Custom"
            )
        order = axes_in_canonical_order(point.site.axes)
        canonical = tensor.permute(order)
        axes = tuple(point.site.axes[i] for i in order)
        has_heads = len(axes) > 2 and axes[2] in ("head", "kv_head")
        heads = self._resolve_heads(canonical, axes, point, has_heads=has_heads)
        rows = resolve_choice(
            self._read("rows"), canonical.shape[0], what=f"{subject}: rows", noun="rows", error=EditError
        )
        pos = self._read("pos")
        chosen = choose_tokens(pos, rows, canonical.shape[1], tokens, subject=subject, device=tensor.device)
        if chosen is None:
            return None
        selection = Selection(
            subject=subject,
            tensor_shape=tuple(tensor.shape),
            n_rows=len(rows),
            drop_pos=isinstance(pos, int),
            drop_head=isinstance(self._heads, int),
            heads_first=has_heads and "query" in axes,
            pair_row=chosen.row,
            layouts=chosen.layouts,
        )
        return Region(
            order=order,
            axes=("token", *axes[2:]),
            row=torch.as_tensor(rows, device=tensor.device)[chosen.row],
            column=chosen.column,
            heads=heads,
            selection=selection,
        )

    @property
    def _heads_field(self) -> str:
        return "head" if self.query_head is None else "query_head"

    @property
    def _heads(self) -> Index:
        return self._read(self._heads_field)

    def _resolve_heads(
        self, canonical: Tensor, axes: tuple[str, ...], point: HookPoint, *, has_heads: bool
    ) -> list[int] | None:
        field = self._heads_field
        if self._heads is None:
            return None
        if not has_heads:
            raise EditError(
                f"{self._subject(point.name)}: {field}={self._heads!r}, but its axes are "
                f"{list(point.site.axes if point.site else ())}, without heads"
            )
        noun, hint = "heads", ""
        if self.query_head is not None:
            noun = "query heads"
        elif axes[2] == "kv_head":
            noun, hint = "key-value heads", query_head_hint(point.name or "")
        what = f"{self._subject(point.name)}: {field}"
        return resolve_choice(self._heads, canonical.shape[2], what=what, noun=noun, hint=hint, error=EditError)

    def _subject(self, name: str | None = None) -> str:
        return f"edit {type(self).__name__}({name or self.name!r})"


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

    Attributes:
        fn: from the tokens and heads selected (`[token ...]`; the whole tensor when nothing is selected) to new
            values of the same shape.
    """

    computes: ClassVar[bool] = False

    fn: Callable[[Tensor], Tensor]

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """What `fn` makes of the region."""
        returned: Any = self.fn(region)
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
