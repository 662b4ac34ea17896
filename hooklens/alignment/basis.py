"""Bases of subspaces as values: orthonormal directions at a hook point, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.alignment.errors import AlignmentError
from hooklens.arguments import optional, read_int, read_seed, read_tensor, read_text, reads, require, show
from hooklens.display import Displayed, Summary, one_line
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Interchange, Project
from hooklens.hooks.values import TensorValue
from hooklens.patching.results.file import TEXT, Expectation, Expected, ResultFile
from hooklens.precision import wide_dtype

When = Literal["all", "prefill", "decode"]
Plain = str | int | float | bool | None

_number_of_dims = partial(read_int, least=1, error=AlignmentError)
_optional_dims = optional(_number_of_dims)


@dataclass(frozen=True)
class Basis(Displayed, TensorValue):
    """Orthonormal directions at a hook point.

    Attributes:
        name: the hook point they belong to.
        rows: `[k d]`, orthonormal.
        origin: where they come from: `"das"`, `"probe"`, `"mean differences"`, `"principal components"`, `"random"`, or
            a text of one's own.
        details: what else is to be kept of that, plain values by name.

    Raises:
        AlignmentError: rows that are no orthonormal ones, or details that no file can hold.
    """

    name: str
    rows: Float[Tensor, "k d"]
    origin: str = "given"
    details: Mapping[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_text(self.name, what="Basis: name", error=AlignmentError)
        read_text(self.origin, what="Basis: origin", error=AlignmentError)
        rows = read_tensor(self.rows, what="Basis: rows", expected="a tensor [k d]", error=AlignmentError)
        if rows.ndim != 2 or not rows.is_floating_point() or not 0 < len(rows) <= rows.shape[1]:
            raise AlignmentError(f"Basis: rows are {show(rows)}; expected real numbers [k d] with k from 1 to d")
        wide = rows.detach().double()
        off = (wide @ wide.T - torch.eye(len(rows), dtype=wide.dtype, device=wide.device)).abs()
        if not bool((off <= max(1e-5, 4 * torch.finfo(rows.dtype).eps)).all()):
            raise AlignmentError(
                f"Basis: rows are not orthonormal (products are off by up to {float(off.max()):.1e}); Basis.of_span "
                "makes a basis of any directions"
            )
        details = dict(
            require(
                self.details, kind=Mapping, what="Basis: details", expected="plain values by name", error=AlignmentError
            )
        )
        unfit = [name for name, one in details.items() if not isinstance(one, Plain)]
        if unfit:
            raise AlignmentError(f"Basis: details {unfit} are no texts, numbers or switches, which a file can hold")
        object.__setattr__(self, "details", MappingProxyType(details))

    def __hash__(self) -> int:
        return hash((self.name, self.rows.shape, self.origin))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        k, d = self.rows.shape
        details = "".join(f", {name}={one!r}" for name, one in self.details.items())
        return one_line(f"Basis({self.name!r}, {k} of {d} directions, {self.origin!r}{details})")

    def _summary(self) -> Summary:
        k, d = self.rows.shape
        return Summary(
            title=f"Basis of {k} of {d} directions at {self.name!r}",
            facts={
                "from": self.origin,
                "stored": f"{self.rows.dtype} on {self.rows.device}".removeprefix("torch."),
                **{name: str(one) for name, one in self.details.items()},
            },
        )

    @classmethod
    @reads(AlignmentError, n_dims=_optional_dims)
    def of_span(
        cls,
        name: str,
        directions: Float[Tensor, "n d"],
        *,
        n_dims: int | None = None,
        origin: str = "given",
        details: Mapping[str, Plain] | None = None,
    ) -> "Basis":
        """An orthonormal basis of the span of some directions, or of what is largest in it.

        Args:
            name: the hook point.
            directions: neither normalised nor independent.
            n_dims: keep so many of the leading right singular vectors; None: as many as there are independent ones.
            origin, details: where they come from.

        Raises:
            AlignmentError: directions that are not finite, all zero, or span fewer dimensions than asked for.
        """
        given = read_tensor(
            directions, what="Basis.of_span: directions", expected="a tensor [n d]", error=AlignmentError
        )
        if given.ndim != 2 or not given.is_floating_point() or not bool(given.isfinite().all()):
            raise AlignmentError(f"Basis.of_span: directions are {show(given)}; expected finite real numbers [n d]")
        _, S, V = torch.linalg.svd(given.detach().double(), full_matrices=False)
        threshold = max(given.shape) * torch.finfo(given.dtype).eps
        rank = int((threshold * S[:1] < S).sum()) if len(S) and float(S[0]) > 0 else 0
        if rank < (n_dims or 1):
            raise AlignmentError(
                f"Basis.of_span: the directions span {rank} dimensions of {name!r}; expected at least {n_dims or 1}"
            )
        rows = V[: n_dims or rank].to(wide_dtype(given.dtype))
        return cls(name, rows, origin, {} if details is None else details)

    @classmethod
    def of_probe(cls, name: str, weight: Float[Tensor, "n d"], *, n_dims: int | None = None) -> "Basis":
        """The directions that a linear probe reads: the span of its weight, one row for each output.

        What all outputs of a softmax share does not change its answer, so the mean over rows is taken out where there
        are several.
        """
        given = read_tensor(weight, what="Basis.of_probe: weight", expected="a tensor [n d]", error=AlignmentError)
        rows = given if len(given) < 2 else given - given.mean(0)
        return cls.of_span(name, rows, n_dims=n_dims, origin="probe", details={"outputs": len(given)})

    @classmethod
    def of_mean_differences(
        cls,
        name: str,
        activations: Float[Tensor, "row d"],
        values: Shaped[Tensor, " row"],
        *,
        n_dims: int | None = None,
    ) -> "Basis":
        """The span of the differences between the mean activations of the values of a variable.

        Of two values it is their difference of means; of more, the leading principal components of the means, each
        counted as often as it occurs (linear discriminants without whitening).

        Raises:
            AlignmentError: another number of values than activations, or a single value.
        """
        kinds, kind_of, counts = _kinds(activations, values)
        means = _means(activations, kind_of, len(kinds))
        weighted = (means - activations.double().mean(0)) * counts[:, None].double().sqrt()
        details = {"rows": len(activations), "values": len(kinds)}
        rows = _leading(weighted, len(kinds) - 1).to(wide_dtype(activations.dtype))
        return cls.of_span(name, rows, n_dims=n_dims, origin="mean differences", details=details)

    @classmethod
    def of_fitted_probe(
        cls,
        name: str,
        activations: Float[Tensor, "row d"],
        values: Shaped[Tensor, " row"],
        *,
        n_dims: int | None = None,
        ridge: float = 1e-3,
    ) -> "Basis":
        """The directions of a linear probe of a variable's values, fitted by ridge regression on one-hot values.

        Args:
            name: the hook point.
            activations: what the probe reads.
            values: the variable's value in each row.
            n_dims: keep so many of the leading directions.
            ridge: the penalty, as a share of the mean variance of an entry.

        Raises:
            AlignmentError: another number of values than activations, or a single value.
        """
        kinds, kind_of, _ = _kinds(activations, values)
        centred = activations.double() - activations.double().mean(0)
        targets = torch.nn.functional.one_hot(kind_of, len(kinds)).double()
        gram = centred.T @ centred
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.lstsq(gram + penalty, centred.T @ (targets - targets.mean(0))).solution.T
        details = {"rows": len(activations), "values": len(kinds), "ridge": ridge}
        rows = _leading(weight, len(kinds) - 1).to(wide_dtype(activations.dtype))
        return cls.of_span(name, rows, n_dims=n_dims, origin="probe", details=details)

    @classmethod
    def of_principal_components(
        cls, name: str, activations: Float[Tensor, "row d"], *, n_dims: int | None = None
    ) -> "Basis":
        """The leading principal components of activations; None: all that vary."""
        centred = activations.double() - activations.double().mean(0)
        rows = centred.to(wide_dtype(activations.dtype))
        details = {"rows": len(activations)}
        return cls.of_span(name, rows, n_dims=n_dims, origin="principal components", details=details)

    @classmethod
    @reads(AlignmentError, n_dims=_number_of_dims, d=_number_of_dims, seed=read_seed)
    def random(cls, name: str, n_dims: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> "Basis":
        """Random orthonormal directions, uniform over subspaces: the placebo.

        The global random state is neither read nor moved.

        Raises:
            AlignmentError: more directions than dimensions.
        """
        if n_dims > d:
            raise AlignmentError(f"Basis.random: n_dims is {n_dims}; expected at most d, {d}")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(d, n_dims, generator=generator, dtype=torch.float64)
        return cls(name, torch.linalg.qr(drawn).Q.T.to(wide_dtype(dtype)), "random", {"seed": seed})

    def interchange(
        self, source: Tensor, *, pos: Choice = None, head: Choice = None, rows: Choice = None, when: When = "all"
    ) -> Interchange:
        """The edit that takes the subspace from another run's activation; see `hooklens.edits.Interchange`."""
        return Interchange(self.name, self.rows, source, pos=pos, head=head, rows=rows, when=when)

    def project(
        self, *, keep: bool = False, pos: Choice = None, head: Choice = None, rows: Choice = None, when: When = "all"
    ) -> Project:
        """The edit that removes the subspace, or keeps nothing but it; see `hooklens.edits.Project`."""
        return Project(self.name, self.rows, keep=keep, pos=pos, head=head, rows=rows, when=when)

    def overlap(self, other: "Basis") -> float:
        """The mean squared cosine of the principal angles between two subspaces; 1 where one lies in the other.

        Two random subspaces of `k` and `m >= k` dimensions among `d` have `m / d` on average.

        Raises:
            AlignmentError: bases of other widths.
        """
        if self.rows.shape[1] != other.rows.shape[1]:
            raise AlignmentError(
                f"Basis.overlap: the bases have {self.rows.shape[1]} and {other.rows.shape[1]} entries"
            )
        products = self.rows.double() @ other.rows.to(self.rows.device).double().T
        return float(products.square().sum()) / min(len(self), len(other))

    def save(self, path: str | Path) -> None:
        """Write the basis to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        _FILE.write(path, {"rows": self.rows}, self.describe())

    @classmethod
    def load(cls, path: str | Path) -> "Basis":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, described = _FILE.read(path, lambda described, tensors: {"rows": Expectation(("k", "d"))})
        return cls(described["name"], tensors["rows"], described["origin"], described["details"])

    def describe(self) -> dict[str, Any]:
        """All but the rows, as a file holds it."""
        return {"name": self.name, "origin": self.origin, "details": dict(self.details)}


def are_details(found: object) -> bool:
    """Whether JSON gave plain values by name."""
    return isinstance(found, dict) and all(isinstance(one, Plain) for one in found.values())


_FILE = ResultFile(
    format="hooklens.alignment.basis-1",
    contents="a basis",
    writer="Basis.save",
    keys={"name": TEXT, "origin": TEXT, "details": Expected("plain values by name", are_details)},
)


def _kinds(
    activations: Float[Tensor, "row d"], values: Shaped[Tensor, " n"]
) -> tuple[Tensor, Int[Tensor, " row"], Int[Tensor, " kind"]]:
    """The different values, which one each row has, and how often each occurs."""
    if values.shape != activations.shape[:1]:
        raise AlignmentError(f"a basis of values needs one for each row: {show(values)} for {show(activations)}")
    kinds, kind_of, counts = torch.unique(values.to(activations.device), return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise AlignmentError(f"a basis of values needs two of them; all {len(values)} rows have {kinds.tolist()}")
    return kinds, kind_of, counts


def _leading(rows: Float[Tensor, "n d"], k: int) -> Float[Tensor, "_ d"]:
    """The leading principal rows: what is told apart by `k + 1` values has `k` dimensions, and the rest is rounding."""
    _, S, V = torch.linalg.svd(rows, full_matrices=False)
    leading: Tensor = S[:k, None] * V[:k]
    return leading


def _means(activations: Float[Tensor, "row d"], kind_of: Int[Tensor, " row"], n: int) -> Float[Tensor, "kind d"]:
    sums = activations.new_zeros(n, activations.shape[1], dtype=torch.float64).index_add_(
        0, kind_of, activations.double()
    )
    return sums / torch.bincount(kind_of, minlength=n)[:, None]
