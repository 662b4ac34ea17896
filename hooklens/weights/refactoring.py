"""Refactoring: writing each head's circuits in terms of their singular vectors.

Only the products `W_Q W_K^T` and `W_V W_O` of a head matter; how they are split into factors is arbitrary.
`refactor_factored_attn_matrices` picks, per head, from the singular value decomposition `U diag(S) V^T`:

    W_Q = U sqrt(S)    W_K = V sqrt(S)        W_V = U diag(S)    W_O = V^T

as TransformerLens does, so entry `j` of a query, key, value or `z` belongs to the j-th largest singular
value and the rows of `W_O` are orthonormal. With biases the score is `[x 1] [W_Q; b_Q] [W_K; b_K]^T [y 1]^T`:
the biases are one more row of `W_Q` and `W_K`, decomposed with them. The bias of the values has been folded
into `b_O` first.

This needs scores that depend on `W_Q` and `W_K` through their product alone, and factors of its own for each
head. Rotary positions and query-key norms act on queries and keys in between, and query heads of one group
share `W_K` and `W_V`, which cannot be aligned with the singular vectors of several heads at once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import HookedConfig, MLAConfig, RotaryPositions
from hooklens.weights.draft import WeightDraft
from hooklens.weights.factored import FactoredMatrix
from hooklens.weights.folding import fold_value_biases, other_attention
from hooklens.weights.steps import ProcessingStep


def _widen_inner(matrix: Float[Tensor, "head rows rank"], d_head: int) -> Float[Tensor, "head rows d_head"]:
    """Zero columns for the singular values that a circuit with fewer than d_head of them lacks."""
    return torch.nn.functional.pad(matrix, (0, d_head - matrix.shape[-1]))


def _refactor_qk(draft: WeightDraft, cfg: HookedConfig, attn: str) -> None:
    queries, keys = draft.read(f"{attn}W_Q"), draft.read(f"{attn}W_K")
    biased = f"{attn}b_Q" in draft.declared
    if biased:
        queries = torch.cat([queries, draft.read(f"{attn}b_Q")[:, None, :]], dim=1)
        keys = torch.cat([keys, draft.read(f"{attn}b_K")[:, None, :]], dim=1)
    even = FactoredMatrix(queries, keys.mT).make_even()
    for part, factor in (("Q", even.A), ("K", even.B.mT)):
        rows = _widen_inner(factor, cfg.d_head)
        draft.write(f"{attn}W_{part}", rows[:, : cfg.d_model])
        if biased:
            draft.write(f"{attn}b_{part}", rows[:, cfg.d_model])


def _refactor_ov(draft: WeightDraft, cfg: HookedConfig, attn: str) -> None:
    U, S, V = FactoredMatrix(draft.read(f"{attn}W_V"), draft.read(f"{attn}W_O")).svd()
    draft.write(f"{attn}W_V", _widen_inner(U * S[:, None, :], cfg.d_head))
    draft.write(f"{attn}W_O", _widen_inner(V, cfg.d_head).mT)


def _refactor_block(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    attn = f"{prefix}attn."
    if f"{attn}W_Q" in draft.declared:
        _refactor_qk(draft, cfg, attn)
        _refactor_ov(draft, cfg, attn)


def _obstacles(cfg: HookedConfig) -> list[str]:
    obstacles = other_attention(cfg)
    attending = [block for block in cfg.blocks if block.attn is not None]
    if any(isinstance(block.positions, RotaryPositions) for block in attending):
        obstacles.append("rotary positions rotate queries and keys before their product (cfg.positions)")
    if any(block.qk_norm is not None for block in attending):
        obstacles.append("query-key norm normalises queries and keys before their product (cfg.qk_norm)")
    if attending and cfg.clip_qkv is not None:
        obstacles.append(f"queries, keys and values are clipped entry by entry (cfg.clip_qkv={cfg.clip_qkv})")
    if latent := [block.layer for block in attending if isinstance(block.attn, MLAConfig)]:
        obstacles.append(
            f"layers {latent} have latent attention, whose keys and values are made behind a norm of their own"
        )
    if cfg.n_kv_heads != cfg.n_heads:
        obstacles.append(
            f"{cfg.n_heads} query heads share the W_K and W_V of {cfg.n_kv_heads} key-value heads, "
            "which can follow the singular vectors of one head only"
        )
    return obstacles


def _with_both_biases(cfg: HookedConfig) -> HookedConfig:
    """The rows of biases are decomposed together, so queries and keys both have one, or none has."""
    has_bias = cfg.block(0).has_bias
    return cfg.replace(q_bias=True, k_bias=True, v_bias=has_bias("v")) if has_bias("q") or has_bias("k") else cfg


refactor_factored_attn_matrices = ProcessingStep(
    name="refactor_factored_attn_matrices",
    find_obstacles=_obstacles,
    change_config=_with_both_biases,
    change=_refactor_block,
    needs=(fold_value_biases,),
)
"""Splits each head's QK and OV circuit along its singular vectors."""
