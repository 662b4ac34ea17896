"""Attention as arithmetic on heads: the fused kernel, and scores, pattern and values one by one.

All tensors are `[batch pos heads d_head]`; grouped-query keys and values keep their `kv_head` axis and query
head `h` reads key-value head `h // (n_heads / n_kv_heads)`. Keys and values need not have as many heads as each
other: one of them may have one for each query head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.precision import wide_dtype, widen


def attend(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv_head d"],
    v: Float[Tensor, "batch key value_head d"],
    *,
    score_scale: float,
    mask: Float[Tensor, "rows one query key"] | None,
    is_causal: bool,
) -> Float[Tensor, "batch query head d"]:
    """Values weighted by the softmax of the scores, by the fused kernel; no query x key tensor is made."""
    if k.shape[2] != v.shape[2]:
        k, v = _match_heads(k, v)
    grouped = q.shape[2] != k.shape[2]
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=score_scale,
        enable_gqa=grouped,
    )
    return z.transpose(1, 2)


def attend_with_log_sum(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv_head d"],
    v: Float[Tensor, "batch key value_head d"],
    *,
    score_scale: float,
    mask: Float[Tensor, "rows one some_query key"] | None,
    is_causal: bool,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch query head d"], Float[Tensor, "batch head query"]]:
    """What `attend` gives, and the log of the sum of the exponentiated scores, -inf where every key is hidden.

    With both, attention over parts of the keys can be put together, see `merge_parts`. The kernel that gives
    both serves the CPU where no gradients are needed: its backward pass leaves the log-sum out.
    """
    needs_graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type != "cpu" or needs_graph or softcap is not None:
        return _attend_explicitly(q, k, v, score_scale=score_scale, mask=mask, is_causal=is_causal, softcap=softcap)
    if k.shape[2] != v.shape[2]:
        k, v = _match_heads(k, v)
    z, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, is_causal, attn_mask=mask, scale=score_scale
    )
    if mask is not None:
        # The kernel gives 0 for a query with no key at all.
        log_sum = log_sum.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return z.transpose(1, 2), log_sum


def _attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_scale: float,
    mask: Tensor | None,
    is_causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    if is_causal:
        later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        mask = torch.zeros(later.shape, dtype=q.dtype, device=q.device).masked_fill(later, -torch.inf)[None, None]
    scores = compute_scores(q, k, score_scale=score_scale, term=None, softcap=softcap, mask=mask)
    log_sum = widen(scores).logsumexp(-1)
    pattern = compute_pattern(scores, can_hide_all=True)
    return weigh_values(pattern, v), log_sum


def merge_parts(
    first: tuple[Float[Tensor, "batch query head d"], Float[Tensor, "batch head query"]],
    second: tuple[Float[Tensor, "batch query head d"], Float[Tensor, "batch head query"]],
) -> Float[Tensor, "batch query head d"]:
    """Attention over two parts of the keys, from the attention over each and its log-sum.

    The softmax over both is the two softmaxes, weighted by their sums of exponentiated scores.
    """
    (z_first, log_sum_first), (z_second, log_sum_second) = first, second
    share = torch.sigmoid(log_sum_first - log_sum_second)
    # Where neither part has a visible key both z are 0, and the share is 0 / 0.
    share = share.masked_fill(log_sum_second == -torch.inf, 1.0)
    return torch.lerp(z_second, z_first, share.transpose(1, 2)[..., None].to(z_first.dtype))


def compute_scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "rows key kv_head d_head"],
    *,
    score_scale: float,
    term: Float[Tensor, "term_rows key head"] | None,
    softcap: float | None,
    mask: Float[Tensor, "rows_of_mask one some_query key"] | None,
) -> Float[Tensor, "batch head query key"]:
    """Scores before the softmax: scaled, biased, soft-capped, -inf where a query may not see a key."""
    products = _by_group(q, k.shape[2]) @ k.permute(0, 2, 3, 1)
    products = products.view(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if term is None and softcap is None and mask is not None:
        return torch.add(mask, products, alpha=score_scale)
    scores = products * score_scale
    if term is not None:
        scores = (scores + term.permute(0, 2, 1)[:, :, None, :]).to(q.dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if mask is None else scores + mask


def compute_pattern(
    scores: Float[Tensor, "batch head query key"], *, can_hide_all: bool
) -> Float[Tensor, "batch head query key"]:
    """The softmax of the scores over keys, in float32 for half precision.

    Args:
        scores: as `compute_scores` gives them.
        can_hide_all: some rows may be -inf throughout; they become 0.
    """
    pattern = torch.softmax(scores, -1, dtype=wide_dtype(scores.dtype))
    if can_hide_all:
        pattern = pattern.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return pattern.to(scores.dtype)


def weigh_values(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "rows key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """The pattern times the values."""
    batch, n_heads, n_query, n_key = pattern.shape
    n_kv_heads = v.shape[2]
    grouped = pattern.reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_query, n_key)
    z = grouped @ v.permute(0, 2, 1, 3)
    return z.reshape(batch, n_heads, n_query, v.shape[3]).transpose(1, 2)


def repeat_heads(heads: Float[Tensor, "batch pos kv_head d"], n_heads: int) -> Float[Tensor, "batch pos head d"]:
    """Keys or values with a copy for each of the query heads that share a key-value head; as they are with so many."""
    n_kv_heads = heads.shape[2]
    return heads if n_kv_heads == n_heads else heads.repeat_interleave(n_heads // n_kv_heads, dim=2)


def _match_heads(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as each other, as the fused kernels want them."""
    n_heads = max(k.shape[2], v.shape[2])
    return repeat_heads(k, n_heads), repeat_heads(v, n_heads)


def _by_group(q: Tensor, n_kv_heads: int) -> Float[Tensor, "batch kv_head group_query d_head"]:
    """Queries of the heads that share a key-value head, one after another."""
    batch, n_query, n_heads, d_head = q.shape
    return q.transpose(1, 2).reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_query, d_head)
