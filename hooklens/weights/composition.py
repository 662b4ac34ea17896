"""Composition scores: how strongly a head reads what an earlier head wrote, told from weights alone.

The score of an earlier matrix `L` (what a head moves, its OV circuit) and a later matrix `R` (what a head
reads with: its QK circuit for queries, the transpose of it for keys, its OV circuit for values) is

    ||L R||_F / (||L||_F ||R||_F),

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". It lies between 0 (nothing that
`L` writes is read by `R`) and 1; random matrices of rank d_head in d_model dimensions score near
`d_model ** -0.5`, so a score means something only above that.

What the weights say is all that is read, as the model has them:

- Norms on the way are left out, their weights included: fold these first (`process_weights(fold_ln=True)`), or scores
  are those of a network without them. Centring and folding value biases change no more than what they change in the
  weights; biases play no part.
- Positions are left out. With rotary positions a query at distance `t` from its key is turned against it, and
  `W_Q W_K^T` is what it reads at distance 0 only: scores for `"Q"` and `"K"` hold there, those for `"V"` everywhere.
- So are query-key norms, with their weights.
- Scores do not depend on how long a matrix is, nor on embeddings: `cfg.embed_scale` and `cfg.attn_scale` play no part.

With `L = A_1 B_1`, `A_1 = Q R_1` and `R = A_2 B_2`, `B_2^T = Q' R_2`, the three norms are those of
`(R_1 B_1) (A_2 R_2^T)`, which is inner x inner, of `R_1 B_1` and of `A_2 R_2^T`.

Scores have gradients to all weights (first ones only); those of a matrix that is zero are zero.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import matrix_norm

from hooklens.errors import InputError
from hooklens.precision import widen
from hooklens.progress import progress_bar
from hooklens.weights.decompositions import right_factor
from hooklens.weights.factored import FactoredMatrix, broadcast_leading

CompositionMode = Literal["Q", "K", "V"]


def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Tensor, "..."]:
    """`||left right||_F / (||left||_F ||right||_F)` over broadcast leading axes; 0 where a matrix is 0.

    To score every pair of two lists, give one a leading axis of size 1: `left.unsqueeze(1)`.

    Raises:
        InputError: the matrices cannot be multiplied or their leading axes do not broadcast.
    """
    if left.rdim != right.ldim:
        raise InputError(
            f"composition_scores: the matrices have shapes {tuple(left.shape)} and {tuple(right.shape)}; "
            "expected the left one's columns to be as many as the right one's rows"
        )
    broadcast_leading(left.shape[:-2], right.shape[:-2], subject="composition_scores")
    writes, reads = _write_side(left), _read_side(right)
    norms = matrix_norm(writes) * matrix_norm(reads)
    return _divide_by_norms(matrix_norm(writes @ reads), norms).to(left.A.dtype)


def all_composition_scores(
    W_Q: Float[Tensor, "layer head d_model d_head"],
    W_K: Float[Tensor, "layer kv_head d_model d_head"],
    W_V: Float[Tensor, "layer kv_head d_model d_head"],
    W_O: Float[Tensor, "layer head d_head d_model"],
    mode: CompositionMode | str,
) -> Float[Tensor, "layer head layer head"]:
    """Scores of every head (first two axes) with every head of a later layer (last two); 0 elsewhere.

    Args:
        W_Q, W_K, W_V, W_O: the weights of all layers; a key-value head counts for each query head it serves.
        mode: `"Q"`, `"K"` or `"V"`: through which input the later head reads. With rotary positions `"Q"` and `"K"`
            hold at distance 0.

    Raises:
        InputError: an unknown mode, or heads that are no multiple of key-value heads.
    """
    _check_heads(W_Q, W_K, W_V, mode)
    n_layers, n_heads = W_Q.shape[:2]
    keys, values = (_repeat_for_groups(weight, n_heads) for weight in (W_K, W_V))
    OV, QK = FactoredMatrix(values, W_O), FactoredMatrix(W_Q, keys.mT)
    reader = {"Q": QK, "K": QK.T, "V": OV}[mode]

    writes, reads = _write_side(OV), _read_side(reader)
    norms = matrix_norm(writes)[:, :, None, None] * matrix_norm(reads)
    writes = writes.flatten(1, 2)  # [layer, head * d_head, d_model]
    reads = reads.transpose(1, 2).flatten(2, 3)  # [layer, d_model, head * d_head]
    width = reads.shape[-1] // n_heads
    scores = torch.zeros_like(norms)
    with progress_bar("composition", range(n_layers), unit="layer", progress=None) as bar:
        for earlier in bar:
            for later in range(earlier + 1, n_layers):
                product = (writes[earlier] @ reads[later]).view(n_heads, -1, n_heads, width)
                scores[earlier, :, later] = matrix_norm(product, dim=(1, 3))
    return _divide_by_norms(scores, norms).to(W_Q.dtype)


def _write_side(matrix: FactoredMatrix) -> Float[Tensor, "*leading rank right"]:
    """The matrix without an orthogonal factor on its left, so that norms of products from the right stay."""
    return right_factor(matrix.A) @ widen(matrix.B)


def _read_side(matrix: FactoredMatrix) -> Float[Tensor, "*leading left rank"]:
    """The matrix without an orthogonal factor on its right."""
    return widen(matrix.A) @ right_factor(matrix.B.mT).mT


def _divide_by_norms(product: Tensor, norms: Tensor) -> Tensor:
    # A head that is zero composes with nothing; 0 / 0 would spoil means and plots, and its gradient those of the rest.
    return product / torch.where(norms > 0, norms, 1)


def _repeat_for_groups(
    weight: Float[Tensor, "layer kv_head d_model d_head"], n_heads: int
) -> Float[Tensor, "layer head d_model d_head"]:
    """A key-value weight seen from the query heads: query head `i` is served by `i // (n_heads / n_kv_heads)`."""
    return weight.repeat_interleave(n_heads // weight.shape[1], dim=1) if weight.shape[1] != n_heads else weight


def _check_heads(W_Q: Tensor, W_K: Tensor, W_V: Tensor, mode: str) -> None:
    if mode not in get_args(CompositionMode):
        raise InputError(f"all_composition_scores: mode is {mode!r}; expected 'Q', 'K' or 'V'")
    n_heads = W_Q.shape[1]
    bad = {name: weight.shape[1] for name, weight in (("W_K", W_K), ("W_V", W_V)) if n_heads % weight.shape[1]}
    if bad:
        found = ", ".join(f"{name} has {heads} heads" for name, heads in bad.items())
        raise InputError(f"all_composition_scores: {found}; expected a divisor of the {n_heads} heads of W_Q")
