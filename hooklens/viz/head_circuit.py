"""The circuits of a head between tokens: which keys a query looks for (QK), which logits a token moves (OV)."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.errors import InputError
from hooklens.viz.grid import Grid, grid
from hooklens.viz.labels import read_labels

_AXES = {"QK": ("query token", "key token"), "OV": ("source token", "output token")}
_TITLES = {"QK": "QK circuit: scores of keys for each query", "OV": "OV circuit: logits that a source token moves"}
_LARGEST = "\N{BLACK CIRCLE}"


@runtime_checkable
class Factored(Protocol):
    """A matrix that is the product of two factors, as `hooklens.weights.FactoredMatrix` is.

    Attributes:
        A: `[left inner]`.
        B: `[inner right]`.
    """

    A: Tensor
    B: Tensor


@reads()
def head_circuit(
    matrix: "Factored | Float[Tensor, 'left right']",
    tokens: Sequence[str],
    *,
    column_tokens: Sequence[str] | None = None,
    ids: Sequence[int] | Int[Tensor, " row"] | None = None,
    column_ids: Sequence[int] | Int[Tensor, " column"] | None = None,
    circuit: Literal["QK", "OV"] = "OV",
    title: str | None = None,
) -> Grid:
    """A head's circuit between some tokens, as a grid with a dot on the largest cell of each row.

    The circuits are those of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits":
    `W_E W_Q W_K^T W_E^T` scores a query against a key (before the scale and positions), `W_E W_V W_O W_U` is what a
    source token that is looked at adds to each logit.

        hl.viz.head_circuit(model.W_E @ model.OV[3, 1] @ model.W_U, [" Mary", " John"], ids=[6035, 1757])

    Args:
        matrix: the circuit, over the whole vocabulary with `ids`, else over `tokens` alone; a tensor, or two factors,
            of which only the rows and columns that are shown are multiplied.
        tokens: what stands at the rows.
        column_tokens: what stands at the columns; None: the same.
        ids: which rows of the matrix the tokens are; None: the matrix has these rows.
        column_ids: which columns; None: `ids`, where `column_tokens` is None too, else all columns of the matrix.
        circuit: names the axes: `"QK"` queries by keys, `"OV"` source tokens by logits.
        title: what the values are.

    Raises:
        InputError: no matrix of two axes, ids that it lacks, or labels that do not go with it.
    """
    if circuit not in _AXES:
        raise InputError(f"head_circuit: circuit is {circuit!r}; expected 'QK' or 'OV'")
    if column_tokens is None:
        column_tokens, column_ids = tokens, ids if column_ids is None else column_ids
    left, right = (matrix, None) if isinstance(matrix, Tensor) else (matrix.A, matrix.B)
    n_rows, n_columns = len(left), (left if right is None else right).shape[-1]
    if left.ndim != 2 or (right is not None and right.ndim != 2):
        shape = list(left.shape) if right is None else [*left.shape[:-1], n_columns]
        raise InputError(
            f"head_circuit: the matrix has the shape {shape}; expected two axes: one head's circuit, such as "
            "model.OV[layer, head]"
        )
    rows = _read_ids(ids, n_rows, "ids")
    columns = _read_ids(column_ids, n_columns, "column_ids")
    values = left[rows][:, columns] if right is None else left[rows] @ right[:, columns]
    labels = read_labels(tokens, len(rows), subject="head_circuit", what="rows")
    column_labels = read_labels(column_tokens, len(columns), subject="head_circuit", what="columns")
    largest = values.argmax(-1).tolist()
    marks = [[_LARGEST if place == best else "" for place in range(len(columns))] for best in largest]
    told = [["largest of its row" if mark else "" for mark in row] for row in marks]
    across, down = _AXES[circuit]
    return grid(
        values,
        rows=(across, labels),
        columns=(down, column_labels),
        texts=marks,
        details=told,
        title=title or _TITLES[circuit],
    )


def _read_ids(given: Sequence[int] | Tensor | None, size: int, what: str) -> list[int]:
    if given is None:
        return list(range(size))
    ids = [int(one) for one in given]
    outside = [one for one in ids if not 0 <= one < size]
    if outside:
        raise InputError(f"head_circuit: {what} holds {outside[:10]}; the matrix has 0 to {size - 1}")
    return ids
