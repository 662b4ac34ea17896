"""Kernels that give attention together with its log-sum-exp, and their backward passes, behind one door.

The front door, `F.scaled_dot_product_attention`, gives no log-sum, and its backward pass cannot be told of keys that
stand elsewhere. The operators behind it can, but they check nothing: a last axis that is not dense or fewer key-value
heads than query heads are read as garbage, and a call without keys ends the process. So nobody calls them but
`attend_to_part` and `differentiate_part`, which hand them only what they are known to read right:

- queries, keys and values of one dtype, dense in their last axis, with equally many heads, none of them empty;
- an additive mask of the same dtype, expanded to rows x heads x queries x keys and dense in its last axis;
- on CUDA float32 or half precision, widths and strides in multiples of 16 bytes, no more than 65,535 heads of rows.

What does not fit (float64 on CUDA, soft caps, other devices) takes `_attend_in_chunks`, plain arithmetic over a few
queries at a time.

A query that sees no key has a result of 0 and a log-sum of `NOTHING`, a finite number, so that the difference of two of
them is no NaN.

The operator behind `torch.rms_norm` gives the denominator, too; `can_show_rms` says where it may be asked.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.torch_version import TorchVersion

from hooklens.errors import InputError
from hooklens.model.attention.grouping import HeadCalls, by_group, from_groups
from hooklens.precision import wide_dtype, widen

# Scores that the chunked way holds at once: 64 MiB in float32.
_SCORES_AT_ONCE = 2**24

# The widths, strides and log-sums of the memory-efficient kernel come in multiples of these.
_ALIGNED_BYTES = 16
_ALIGNED_QUERIES = 32
_MOST_BLOCKS = 65_535

# The log-sum of no scores: for any score behind it, exp(score - NOTHING) with the score at -inf is 0, and the share of
# such a part beside any other is 0, as with -inf.
NOTHING = -1e30


# From this version on the front door of RMSNorm goes to an operator that gives the denominator with the result.
_RMS_SHOWS_SCALE = TorchVersion(torch.__version__) >= TorchVersion("2.9")


class Part(NamedTuple):
    """Some of the keys that queries attend to, with their values.

    Attributes:
        k: `[rows key kv_head d]`; one row serves all rows of queries.
        v: `[rows key value_head d_v]`.
        mask: added to the scores, `[rows one some_query key]` of 0 and -inf; None: nothing is hidden.
        is_causal: query `i` sees keys `0` to `i` only; goes without a mask.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    is_causal: bool = False


class Rule(NamedTuple):
    """How scores are made of products: `softcap * tanh(scale * product / softcap)`, or without a cap."""

    scale: float
    softcap: float | None = None


def attend_to_part(
    q: Float[Tensor, "batch query head d"], part: Part, rule: Rule
) -> tuple[Float[Tensor, "batch query head d_v"], Float[Tensor, "batch head query"]]:
    """Attention over a part of the keys and the log of the sum of its exponentiated scores.

    Records no gradients. Keys have as many rows as queries, and as many heads as values.

    Raises:
        InputError: the shapes do not fit each other.
    """
    _check_shapes(q, part)
    batch, n_query, n_heads, _ = q.shape
    if 0 in q.shape or 0 in part.k.shape:
        log_sum = torch.full((batch, n_heads, n_query), NOTHING, dtype=wide_dtype(q.dtype), device=q.device)
        return q.new_zeros(batch, n_query, n_heads, part.v.shape[-1]), log_sum
    kernel = _choose_kernel(q, part, rule)
    if kernel is None:
        return _attend_in_chunks(q, part, rule)
    if n_heads == part.k.shape[2]:
        q, k, v = q.transpose(1, 2), part.k.transpose(1, 2), part.v.transpose(1, 2)
        z, log_sum = kernel.forward(_lay_out(kernel, q, k, v, part.mask, part, rule))
        z = z.transpose(1, 2)
    else:
        calls = HeadCalls(q, part.k, part.mask, is_causal=part.is_causal)
        results = [kernel.forward(operands) for operands in _operands(kernel, calls, q, part, rule)]
        z = calls.join([z for z, _ in results])
        log_sum = calls.join_sums([log_sum for _, log_sum in results])
    if part.mask is not None:
        # The kernels give 0 for a query with no key, a result of 0 and a log-sum of 0.
        log_sum = log_sum.masked_fill(part.mask.amax(-1) == -torch.inf, NOTHING)
    return z, log_sum


def differentiate_part(
    grad_z: Float[Tensor, "batch query head d_v"],
    q: Float[Tensor, "batch query head d"],
    part: Part,
    z: Float[Tensor, "batch query head d_v"],
    log_sum: Float[Tensor, "batch head query"],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one part.

    Args:
        grad_z: the gradient of the result.
        q: queries.
        part: the part.
        z: the result over all parts, not only over this one.
        log_sum: likewise; with both, the pattern is what it is among all keys and the gradient is exact.
        rule: how scores are made.
    """
    if 0 in q.shape or 0 in part.k.shape:
        return torch.zeros_like(q), torch.zeros_like(part.k), torch.zeros_like(part.v)
    kernel = _choose_kernel(q, part, rule)
    if kernel is None:
        return _differentiate_in_chunks(grad_z, q, part, z, log_sum, rule)
    calls = HeadCalls(q, part.k, part.mask, is_causal=part.is_causal)
    pieces = zip(
        calls.split(grad_z),
        _operands(kernel, calls, q, part, rule),
        calls.split(z),
        calls.split_sums(log_sum),
        strict=True,
    )
    of_queries, of_keys, of_values = zip(*(kernel.backward(*piece) for piece in pieces), strict=True)
    return calls.join(list(of_queries)), calls.join_keys(list(of_keys)), calls.join_keys(list(of_values))


def _check_shapes(q: Tensor, part: Part) -> None:
    """The kernels read past the end of what is too small."""
    q_shape, k_shape, v_shape = q.shape, part.k.shape, part.v.shape
    fits = q_shape[0] == k_shape[0] == v_shape[0] and k_shape[1:3] == v_shape[1:3] and q_shape[3] == k_shape[3]
    if not fits or (k_shape[2] and q_shape[2] % k_shape[2]):
        raise InputError(
            f"attention got queries {list(q_shape)}, keys {list(k_shape)} and values {list(v_shape)}; expected "
            "[rows pos heads d], with one row of keys or as many as of queries, as many keys as values, and a number "
            "of query heads that the key-value heads divide: check what hooks return and the key-value cache"
        )


class _Operands(NamedTuple):
    """What one call of a kernel works on.

    Attributes:
        q, k, v: `[rows head pos d]`, laid out as the kernel reads them.
        mask: at the shape of the scores.
        is_causal, scale: as in `Part` and `Rule`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float


class _FlashOnCpu:
    """The CPU's flash kernel."""

    @staticmethod
    def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
        return q.device.type == "cpu" and q.dtype.is_floating_point and q.shape[-1] == k.shape[-1] == v.shape[-1]

    @staticmethod
    def lay_out(x: Tensor) -> Tensor:
        """The tensor with a dense last axis: a hook may return one that repeats a single number."""
        return x if x.stride(-1) == 1 else x.contiguous()

    @staticmethod
    def forward(operands: _Operands) -> tuple[Tensor, Tensor]:
        q, k, v, mask, is_causal, scale = operands
        z, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return z, log_sum

    @staticmethod
    def backward(grad_z: Tensor, operands: _Operands, z: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, is_causal, scale = operands
        # The kernel reads the log-sum as its forward pass writes it: heads next to each other.
        log_sum = log_sum.transpose(1, 2).contiguous().transpose(1, 2)
        grad_z, z = _FlashOnCpu.lay_out(grad_z), _FlashOnCpu.lay_out(z)
        of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_z, q, k, v, z, log_sum, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return of_q, of_k, of_v


class _EfficientOnCuda:
    """CUDA's memory-efficient kernel, the one there that takes a mask."""

    @staticmethod
    def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
        if q.device.type != "cuda" or torch.version.hip is not None:
            return False
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False
        if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
            return False
        widths = (q.shape[-1], k.shape[-1], v.shape[-1])
        return (
            all(width * q.itemsize % _ALIGNED_BYTES == 0 for width in widths)
            and q.shape[0] * q.shape[2] <= _MOST_BLOCKS
        )

    @staticmethod
    def lay_out(x: Tensor) -> Tensor:
        """The tensor with a dense last axis and every other stride a multiple of 16 bytes."""
        strides = x.stride()
        fits = strides[-1] == 1 and all(stride * x.itemsize % _ALIGNED_BYTES == 0 for stride in strides[:-1])
        return x if fits else x.contiguous()

    @staticmethod
    def forward(operands: _Operands) -> tuple[Tensor, Tensor]:
        q, k, v, mask, is_causal, scale = operands
        z, log_sum, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_bias=mask, compute_log_sumexp=True, is_causal=is_causal, scale=scale
        )
        return z, log_sum[..., : q.shape[2]]

    @staticmethod
    def backward(grad_z: Tensor, operands: _Operands, z: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, is_causal, scale = operands
        # Queries past the last are read, and are nothing: exp(score - inf) is 0.
        log_sum = torch.nn.functional.pad(log_sum, (0, -log_sum.shape[-1] % _ALIGNED_QUERIES), value=torch.inf)
        # The backward pass takes the result with no other strides than the forward pass gives: rows x queries x heads.
        z = z.transpose(1, 2).contiguous().transpose(1, 2)
        no_dropout = torch.empty((), dtype=torch.long, device=q.device)
        of_q, of_k, of_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            _EfficientOnCuda.lay_out(grad_z), q, k, v, mask, z, log_sum.contiguous(),
            no_dropout, no_dropout, 0.0, [True, True, True, False], is_causal, scale=scale,
        )  # fmt: skip
        return of_q, of_k, of_v


_Kernel = type[_FlashOnCpu] | type[_EfficientOnCuda]
_FLASH, _EFFICIENT = _FlashOnCpu, _EfficientOnCuda


def _choose_kernel(q: Tensor, part: Part, rule: Rule) -> "_Kernel | None":
    """The fused kernel that reads these tensors right; None: the chunked way."""
    if rule.softcap is not None or not q.dtype == part.k.dtype == part.v.dtype:
        return None
    if _FLASH.serves(q, part.k, part.v):
        return _FLASH
    return _EFFICIENT if _EFFICIENT.serves(q, part.k, part.v) else None


def _operands(kernel: _Kernel, calls: HeadCalls, q: Tensor, part: Part, rule: Rule) -> Iterator[_Operands]:
    """What each call works on."""
    for q_i, (k_i, v_i) in zip(calls.split(q), calls.split_keys(part.k, part.v), strict=True):
        yield _lay_out(kernel, q_i, k_i, v_i, calls.mask, part, rule)


def _lay_out(
    kernel: _Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, part: Part, rule: Rule
) -> _Operands:
    q, k, v = kernel.lay_out(q), kernel.lay_out(k), kernel.lay_out(v)
    return _Operands(q, k, v, _expand_mask(mask, q, k), part.is_causal, rule.scale)


def _expand_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask at the shape of the scores, without a copy where its rows are aligned, see `additive_mask`."""
    if mask is None:
        return None
    mask = mask.to(q.dtype)
    strides, sizes = mask.stride(), mask.shape
    aligned = all(
        stride % _ALIGNED_BYTES == 0 or size == 1 for stride, size in zip(strides[:-1], sizes[:-1], strict=True)
    )
    if strides[-1] != 1 or (q.device.type != "cpu" and not aligned):
        n_key = mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, -n_key % _ALIGNED_BYTES))[..., :n_key]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _attend_in_chunks(q: Tensor, part: Part, rule: Rule) -> tuple[Tensor, Tensor]:
    """`attend_to_part` by plain arithmetic, a chunk of queries at a time."""
    results = []
    for chunk in _chunks(q, part):
        scores = widen(_score(q[:, chunk], part, rule))
        mask = _mask_of_chunk(part, chunk, q)
        if mask is not None:
            scores = scores + mask
        log_sum = scores.logsumexp(-1).clamp(min=NOTHING)
        pattern = (scores - log_sum[..., None]).exp().to(q.dtype)
        z = from_groups(_group_rows(pattern, part.v.shape[2]) @ part.v.transpose(1, 2), q.shape[2])
        results.append((z, log_sum))
    return torch.cat([z for z, _ in results], 1), torch.cat([log_sum for _, log_sum in results], -1)


def _differentiate_in_chunks(
    grad_z: Tensor, q: Tensor, part: Part, z: Tensor, log_sum: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """`differentiate_part` by plain arithmetic, a chunk of queries at a time."""
    k, v = part.k.transpose(1, 2), part.v.transpose(1, 2)
    delta = (widen(z) * widen(grad_z)).sum(-1).transpose(1, 2)[..., None]
    of_q = []
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for chunk in _chunks(q, part):
        scores = widen(_score(q[:, chunk], part, rule))
        mask = _mask_of_chunk(part, chunk, q)
        shifted = scores - log_sum[..., chunk, None]
        pattern = (shifted if mask is None else shifted + mask).exp()
        grad_group, q_group = by_group(grad_z[:, chunk], v.shape[1]), by_group(q[:, chunk], k.shape[1])
        of_pattern = widen(grad_group @ v.mT).view(pattern.shape)
        of_scores = pattern * (of_pattern - delta[..., chunk, :])
        if rule.softcap is not None:
            of_scores = of_scores * (1 - (scores / rule.softcap).square())
        of_products = _group_rows((of_scores * rule.scale).to(q.dtype), k.shape[1])
        of_q.append(from_groups(of_products @ k, q.shape[2]))
        of_k = of_k + of_products.mT @ q_group
        of_v = of_v + _group_rows(pattern.to(q.dtype), v.shape[1]).mT @ grad_group
    return torch.cat(of_q, 1), of_k.transpose(1, 2), of_v.transpose(1, 2)


def _chunks(q: Tensor, part: Part) -> list[slice]:
    batch, n_query, n_heads, _ = q.shape
    size = max(1, _SCORES_AT_ONCE // (batch * n_heads * part.k.shape[1]))
    return [slice(start, min(start + size, n_query)) for start in range(0, n_query, size)]


def _score(q: Tensor, part: Part, rule: Rule) -> Float[Tensor, "batch head query key"]:
    products = by_group(q, part.k.shape[2]) @ part.k.permute(0, 2, 3, 1)
    scores = products.view(q.shape[0], q.shape[2], q.shape[1], part.k.shape[1]) * rule.scale
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def _mask_of_chunk(part: Part, chunk: slice, q: Tensor) -> Tensor | None:
    if part.is_causal:
        queries = torch.arange(chunk.start, chunk.stop, device=q.device)
        later = torch.arange(part.k.shape[1], device=q.device) > queries[:, None]
        return torch.zeros(later.shape, dtype=q.dtype, device=q.device).masked_fill(later, -torch.inf)
    mask = part.mask
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, chunk]


def _group_rows(x: Float[Tensor, "batch head query key"], n_kv_heads: int) -> Float[Tensor, "batch kv_head rows key"]:
    batch, n_heads, n_query, n_key = x.shape
    return x.reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_query, n_key)


def can_show_rms(x: Float[Tensor, "*axes size"], size: tuple[int, ...], weight: Tensor | None) -> bool:
    """Whether `rms_norm_with_scale` gives what `torch.rms_norm` gives: on the CPU, of sizes and dtypes that fit."""
    return (
        _RMS_SHOWS_SCALE
        and x.device.type == "cpu"
        and x.shape[-1:] == size
        and (weight is None or (weight.dtype == x.dtype and weight.shape == size))
        and not torch.compiler.is_compiling()
    )


def rms_norm_with_scale(
    x: Float[Tensor, "*axes size"], size: tuple[int, ...], weight: Float[Tensor, " size"] | None, eps: float
) -> tuple[Float[Tensor, "*axes size"], Float[Tensor, "*axes one"]]:
    """RMSNorm over the last axis, and the inverse of its denominator; ask `can_show_rms` first."""
    out, inverse_scale = torch.ops.aten._fused_rms_norm.default(x, size, weight, eps)
    return out, inverse_scale
