"""Attention as arithmetic on heads: fused, over keys in parts, and scores, pattern and values one by one.

All tensors are `[batch pos heads d_head]`; grouped-query keys and values keep their `kv_head` axis and query
head `h` reads key-value head `h // (n_heads / n_kv_heads)`. Keys and values need not have as many heads as each
other: one of them may have one for each query head.

A mask is a term of the scores, 0 or -inf, see `additive_mask`. A query that sees no key has a pattern of 0, a result
of 0 and a log-sum of -inf, and no gradient passes it: scores of -inf throughout are replaced before any softmax, since
what a `where` hides behind a NaN comes back as NaN times 0 in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

from hooklens.errors import InputError
from hooklens.model.attention.grouping import HeadCalls, by_group
from hooklens.model.attention.kernels import NOTHING, Part, Rule, attend_to_part, differentiate_part
from hooklens.precision import wide_dtype, widen

# A mask with rows of a multiple of this many numbers goes to the kernels as it is, else each call copies it.
_MASK_ROW = 16

# `enable_gqa` goes to the CPU's fused kernel; before, to one that makes all scores and repeats the keys.
_CPU_TAKES_GROUPS = TorchVersion(torch.__version__) >= TorchVersion("2.9")

# torch.compile gives up on a backward pass that asks for the strides of its tensors.
_COMPILER_TRACES_FUNCTIONS = TorchVersion(torch.__version__) >= TorchVersion("2.8")


def additive_mask(
    hidden: Bool[Tensor, "rows one some_query key"], dtype: torch.dtype
) -> Float[Tensor, "rows one some_query key"]:
    """The mask as a term of the scores: -inf where a key is hidden, else 0; laid out as the kernels want it.

    Make it once per call, not once per layer.
    """
    n_key = hidden.shape[-1]
    padded = F.pad(hidden, (0, -n_key % _MASK_ROW))
    return torch.zeros(padded.shape, dtype=dtype, device=hidden.device).masked_fill(padded, -torch.inf)[..., :n_key]


def attend(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv_head d"],
    v: Float[Tensor, "batch key value_head d_v"],
    *,
    score_scale: float,
    mask: Float[Tensor, "rows one some_query key"] | None,
    is_causal: bool,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "batch query head d_v"]:
    """Values weighted by the softmax of the scores; no query x key tensor is made.

    A soft cap takes the chunked way of `attend_in_parts`, and sinks its log-sums. float64 on CUDA has no fused kernel
    in PyTorch, nor have `vmap`, `jvp` and second derivatives of `torch.func`: these make the scores.
    """
    if softcap is not None or sinks is not None:
        part = Part(k, v, mask, is_causal)
        return attend_in_parts(q, [part], score_scale=score_scale, softcap=softcap, sinks=sinks)
    if torch._C._are_functorch_transforms_active() and _in_transform_without_kernel():
        return attend_explicitly(q, [Part(k, v, mask, is_causal)], score_scale=score_scale, softcap=None)
    d_v = v.shape[-1]
    if d_v != q.shape[-1] == k.shape[-1] and q.device.type == "cpu":
        q, k, v = _widen_heads(q, k, v)
    n_kv_heads = k.shape[2]
    if n_kv_heads != v.shape[2]:
        k, v = _match_heads(k, v)
        n_kv_heads = k.shape[2]
    grouped = q.shape[2] != n_kv_heads
    if grouped and not _kernel_takes_groups(q, mask):
        calls = HeadCalls(q, k, mask, is_causal=is_causal)
        results = [
            F.scaled_dot_product_attention(q_i, k_i, v_i, calls.mask, is_causal=is_causal, scale=score_scale)
            for q_i, (k_i, v_i) in zip(calls.split(q), calls.split_keys(k, v), strict=True)
        ]
        return calls.join(results)[..., :d_v]
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=score_scale,
        enable_gqa=grouped,
    )
    z = z.transpose(1, 2)
    return z if z.shape[-1] == d_v else z[..., :d_v]


def _widen_heads(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values with zeros up to one width, as the CPU's fused kernel wants them.

    They add nothing to products, and to results entries past those of the values.
    """
    width = max(tensor.shape[-1] for tensor in tensors)
    return [F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]


def _in_transform_without_kernel() -> bool:
    """Whether the `torch.func` transforms at work are others than one `grad` alone."""
    return [level.key() for level in get_interpreter_stack() or []] != [TransformType.Grad]


def _kernel_takes_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the front door has a fused kernel for grouped queries; on CUDA only flash, which takes no mask."""
    if q.device.type == "cpu":
        return _CPU_TAKES_GROUPS
    return mask is None and q.dtype in (torch.float16, torch.bfloat16)


def attend_in_parts(
    q: Float[Tensor, "batch query head d"],
    parts: Sequence[Part],
    *,
    score_scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "batch query head d_v"]:
    """Attention over keys that stand in several places; neither they nor any query x key tensor are put together.

    Each part's attention comes with its log-sum, and the parts are weighted by these. A part of one row serves every
    row of queries without a copy: their queries stand one after another as the queries of that row. Gradients flow
    to the queries and to the keys and values of every part, once: a second derivative needs the pattern.

    float64 on CUDA and soft caps are computed a chunk of queries at a time, in more steps and with no more memory
    than a chunk's scores. Inside `torch.func` transforms, which cannot see into kernels, all scores are made.

    Args:
        q: queries.
        parts: keys and values, in any order. The mask of a part of one row may be as for any other, or with the rows
            of queries one after another, `[1 one batch*query key]`; make that one once per call.
        score_scale: what products are multiplied by.
        softcap: bound of the scores, `softcap * tanh(score / softcap)`; None: none.
        sinks: a logit of each head that takes part in the softmax and has no value; None: none.

    Raises:
        InputError: queries, keys and values of different dtypes outside autocast, or of shapes that do not fit.
    """
    q, parts = _agree_on_dtype(q, parts)
    d_v = parts[0].v.shape[-1]
    widths = {q.shape[-1], *(part.k.shape[-1] for part in parts)}
    if len(widths) == 1 and d_v not in widths and q.device.type == "cpu" and softcap is None:
        q, *tensors = _widen_heads(q, *(tensor for part in parts for tensor in (part.k, part.v)))
        parts = [part._replace(k=k, v=v) for part, k, v in zip(parts, tensors[::2], tensors[1::2], strict=True)]
        z = attend_in_parts(q, parts, score_scale=score_scale, sinks=sinks)
        return z[..., :d_v]
    fitted = [_fit_part(q, part) for part in parts]
    if torch._C._are_functorch_transforms_active():
        return attend_explicitly(q, fitted, score_scale=score_scale, softcap=softcap, sinks=sinks)
    tensors = [tensor for part in fitted for tensor in (part.k, part.v)]
    rule = Rule(score_scale, softcap)
    leaves = (q, *tensors) if sinks is None else (q, sinks, *tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves):
        if torch.compiler.is_compiling() and not _COMPILER_TRACES_FUNCTIONS:
            return attend_explicitly(q, fitted, score_scale=score_scale, softcap=softcap, sinks=sinks)
        apply: Callable[..., Tensor] = _AttendInParts.apply
        return apply(q, rule, [(part.mask, part.is_causal) for part in fitted], sinks, *tensors)
    return _merge_all(q, fitted, rule, sinks, needs_total=False)[0]


class _AttendInParts(torch.autograd.Function):
    """Attention over parts, whose backward pass hands each part's kernel the result and log-sum over all parts."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        rule: Rule,
        masks: list[tuple[Tensor | None, bool]],
        sinks: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        parts = _build_parts(tensors, masks)
        z, log_sum = _merge_all(q, parts, rule, sinks, needs_total=True)
        ctx.save_for_backward(q, z, log_sum, sinks, *tensors)
        ctx.rule, ctx.masks = rule, masks
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *gradients)


@once_differentiable
def _differentiate(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
    q, z, log_sum, sinks, *tensors = ctx.saved_tensors
    batch, n_query, n_heads, _ = q.shape
    of_q = None
    of_tensors: list[Tensor] = []
    for part in _build_parts(tensors, ctx.masks):
        rows = part.k.shape[0]
        log_sum_of_part = log_sum
        if rows != batch:
            log_sum_of_part = log_sum.transpose(0, 1).reshape(1, n_heads, batch * n_query)
        of_part, of_k, of_v = differentiate_part(
            _fold(grad_z, rows), _fold(q, rows), part, _fold(z, rows), log_sum_of_part, ctx.rule
        )
        of_part = of_part.reshape(q.shape)
        of_q = of_part if of_q is None else of_q + of_part
        of_tensors += [of_k, of_v]
    of_sinks = None if sinks is None else _differentiate_sinks(grad_z, z, log_sum, sinks)
    return of_q, None, None, of_sinks, *of_tensors


def _build_parts(tensors: Sequence[Tensor], masks: list[tuple[Tensor | None, bool]]) -> list[Part]:
    return [Part(tensors[2 * i], tensors[2 * i + 1], mask, is_causal) for i, (mask, is_causal) in enumerate(masks)]


def _differentiate_sinks(grad_z: Tensor, z: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of sinks: what they take of the softmax, times what the result would gain without."""
    share = (sinks.to(log_sum.dtype)[:, None] - log_sum).exp()
    gained = (widen(grad_z) * widen(z)).sum(-1).transpose(1, 2)
    return -(share * gained).sum((0, 2)).to(sinks.dtype)


def _merge_all(
    q: Tensor, parts: Sequence[Part], rule: Rule, sinks: Tensor | None, *, needs_total: bool
) -> tuple[Tensor, Tensor]:
    """Attention over all parts and the sinks, and the log-sum over them where that is needed."""
    batch, n_query, n_heads, _ = q.shape
    results = []
    for part in parts:
        z, log_sum = attend_to_part(_fold(q, part.k.shape[0]), part, rule)
        if part.k.shape[0] != batch:
            z = z.reshape(batch, n_query, n_heads, z.shape[-1])
            log_sum = log_sum.reshape(n_heads, batch, n_query).transpose(0, 1)
        results.append((z, log_sum))
    z, total = results[0]
    for i, (other, log_sum) in enumerate(results[1:], 2):
        z = _weigh(z, other, total - log_sum)
        if needs_total or i < len(results) or sinks is not None:
            total = torch.logaddexp(total, log_sum)
    if sinks is not None:
        # A part with values of 0.
        logits = sinks.to(total.dtype)[:, None]
        z = z * torch.sigmoid(total - logits).transpose(1, 2)[..., None].to(z.dtype)
        total = torch.logaddexp(total, logits)
    return z, total


def _fold(x: Tensor, rows: int) -> Tensor:
    """Rows of queries one after another as the queries of one row, where the part has one row only."""
    return x if x.shape[0] == rows else x.flatten(0, 1)[None]


def _fit_part(q: Tensor, part: Part) -> Part:
    """The part with as many heads of keys as of values, one row or as many as queries, and a mask for these."""
    k, v = part.k, part.v
    if k.shape[2] != v.shape[2]:
        k, v = _match_heads(k, v)
    batch, n_query, mask = q.shape[0], q.shape[1], part.mask
    assert mask is None or not part.is_causal
    if k.shape[0] == v.shape[0] == batch:
        return part if k is part.k and v is part.v else Part(k, v, mask, part.is_causal)
    if part.is_causal or k.shape[0] != v.shape[0]:
        return Part(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), mask, part.is_causal)
    stacked = (1, batch * n_query)
    if mask is not None and (mask.shape[0], mask.shape[2]) not in ((1, 1), stacked):
        mask = mask.expand(batch, -1, n_query, -1).reshape(1, 1, batch * n_query, mask.shape[-1])
    return Part(k, v, mask)


def _agree_on_dtype(q: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Sequence[Part]]:
    """Queries and parts of one dtype, as the front door wants and, under autocast, makes them."""
    found = {q.dtype, *(tensor.dtype for part in parts for tensor in (part.k, part.v))}
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        if found != {dtype}:
            return q.to(dtype), [part._replace(k=part.k.to(dtype), v=part.v.to(dtype)) for part in parts]
    elif len(found) > 1:
        raise InputError(
            f"attention got queries of {q.dtype} and keys and values of "
            f"{', '.join(sorted({str(x.dtype) for part in parts for x in (part.k, part.v)}))}; expected one dtype: "
            "convert the model or the key-value cache, or what a hook returns for hook_q, hook_k or hook_v"
        )
    return q, parts


def attend_explicitly(
    q: Tensor,
    parts: Sequence[Part],
    *,
    score_scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over parts through the pattern over all keys."""
    scores, values = [], []
    for part in parts:
        mask = _causal_mask(q, part.k) if part.is_causal else part.mask
        if mask is not None and mask.shape[2] not in (1, q.shape[1]):
            mask = mask.view(q.shape[0], 1, q.shape[1], mask.shape[-1])
        k = part.k.expand(q.shape[0], -1, -1, -1)
        scores.append(compute_scores(q, k, score_scale=score_scale, term=None, softcap=softcap, mask=mask))
        values.append(part.v.expand(q.shape[0], -1, -1, -1))
    pattern = compute_pattern(torch.cat(scores, -1), can_hide_all=True, sinks=sinks)
    pieces = torch.split(pattern, [v.shape[1] for v in values], -1)
    return torch.stack([weigh_values(piece, v) for piece, v in zip(pieces, values, strict=True)]).sum(0)


def _causal_mask(q: Tensor, k: Tensor) -> Tensor:
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    return additive_mask(later[None, None], q.dtype)


def attend_with_log_sum(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv_head d"],
    v: Float[Tensor, "batch key value_head d_v"],
    *,
    score_scale: float,
    mask: Float[Tensor, "rows one some_query key"] | None,
    is_causal: bool,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch query head d_v"], Float[Tensor, "batch head query"]]:
    """What `attend` gives, and the log of the sum of the exponentiated scores, -inf where every key is hidden.

    With both, attention over parts of the keys can be put together, see `merge_parts`. Where gradients are recorded
    the scores are made: no kernel's backward pass knows the log-sum. `attend_in_parts` does both without them.
    """
    k, v = _match_heads(k, v)
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not tracked and not torch._C._are_functorch_transforms_active():
        z, log_sum = attend_to_part(q, Part(k, v, mask, is_causal), Rule(score_scale, softcap))
        return z, log_sum.masked_fill(log_sum == NOTHING, -torch.inf)
    if is_causal:
        mask = _causal_mask(q, k)
    scores = compute_scores(q, k, score_scale=score_scale, term=None, softcap=softcap, mask=mask)
    z = weigh_values(compute_pattern(scores, can_hide_all=True), v)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    log_sum = widen(scores).masked_fill(empty, 0.0).logsumexp(-1)
    return z, log_sum.masked_fill(empty[..., 0], -torch.inf)


def merge_parts(
    first: tuple[Float[Tensor, "batch query head d_v"], Float[Tensor, "batch head query"]],
    second: tuple[Float[Tensor, "batch query head d_v"], Float[Tensor, "batch head query"]],
) -> Float[Tensor, "batch query head d_v"]:
    """Attention over two parts of the keys, from the attention over each and its log-sum.

    The softmax over both is the two softmaxes, weighted by their sums of exponentiated scores.
    """
    (z_first, log_sum_first), (z_second, log_sum_second) = first, second
    # Where neither part has a visible key both z are 0 and any share will do; -inf - -inf would be NaN.
    empty = (log_sum_first == -torch.inf) & (log_sum_second == -torch.inf)
    return _weigh(z_first, z_second, log_sum_first.masked_fill(empty, 0.0) - log_sum_second.masked_fill(empty, 0.0))


def _weigh(z_first: Tensor, z_second: Tensor, log_ratio: Float[Tensor, "batch head query"]) -> Tensor:
    """Two results weighted by their sums of exponentiated scores, given the logarithm of the sums' ratio."""
    share = torch.sigmoid(log_ratio).transpose(1, 2)[..., None]
    return torch.lerp(z_second, z_first, share.to(z_first.dtype))


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
    products = by_group(q, k.shape[2]) @ k.permute(0, 2, 3, 1)
    if k.shape[2] != q.shape[2]:
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
    scores: Float[Tensor, "batch head query key"],
    *,
    can_hide_all: bool,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """The softmax of the scores over keys, in float32 for half precision.

    Args:
        scores: as `compute_scores` gives them.
        can_hide_all: some rows may be -inf throughout; they become 0.
        sinks: a logit of each head that takes part in the softmax, and is left out of the pattern.
    """
    if sinks is not None:
        wide = widen(scores)
        column = sinks.to(wide.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([wide, column], -1), -1)[..., :-1].to(scores.dtype).contiguous()
    if not can_hide_all:
        return torch.softmax(scores, -1, dtype=wide_dtype(scores.dtype)).to(scores.dtype)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    pattern = torch.softmax(scores.masked_fill(empty, 0.0), -1, dtype=wide_dtype(scores.dtype))
    return pattern.masked_fill(empty, 0.0).to(scores.dtype)


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
