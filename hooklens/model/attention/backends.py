"""Attention by one way that a config asks for, in place of whatever is fastest (`HookedConfig.attention_backend`).

`explicit` makes scores, pattern and values one by one, as listeners see them. `flex` hands PyTorch's `flex_attention`
the same as functions of single scores: it is one fused kernel inside `torch.compile`, and elsewhere makes the scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.torch_version import TorchVersion

from hooklens.errors import InputError
from hooklens.model.attention.attend import compute_pattern, compute_scores, repeat_heads, weigh_values
from hooklens.model.plan.visibility import Sight
from hooklens.optional import import_package

_FLEX = "torch.nn.attention.flex_attention"
_FLEX_TAKES_ANY_WIDTH = TorchVersion(torch.__version__) >= TorchVersion("2.7")


def attend_by_pattern(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "rows key kv_head d"],
    v: Float[Tensor, "rows key value_head d_v"],
    *,
    score_scale: float,
    sight: Sight,
    softcap: float | None,
    term: Float[Tensor, "term_rows key head"] | None,
    sinks: Float[Tensor, " head"] | None,
) -> Float[Tensor, "batch query head d_v"]:
    """Values weighted by the pattern, which is made of the scores."""
    scores = compute_scores(q, k, score_scale=score_scale, term=term, softcap=softcap, mask=sight.mask)
    return weigh_values(compute_pattern(scores, can_hide_all=sight.can_hide_all, sinks=sinks), v)


def attend_by_flex(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "rows key kv_head d"],
    v: Float[Tensor, "rows key value_head d_v"],
    *,
    score_scale: float,
    blocks: Any,
    softcap: float | None,
    term: Float[Tensor, "term_rows key head"] | None,
    sinks: Float[Tensor, " head"] | None,
) -> Float[Tensor, "batch query head d_v"]:
    """Values weighted by `flex_attention`.

    Args:
        q: queries.
        k: keys.
        v: values.
        score_scale: what products are multiplied by.
        blocks: what queries see, from `make_blocks`; None: everything.
        softcap: bound of the scores.
        term: what each head adds to its scores at each key.
        sinks: a logit of each head that takes part in the softmax and has no value.

    Raises:
        InputError: gradients on the CPU, where `flex_attention` has none, or heads of a width that the installed
            PyTorch's takes none of.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v)):
        raise InputError(
            "attention_backend='flex' has no gradients on the CPU (PyTorch's flex_attention): call the model under "
            "torch.no_grad(), on CUDA, or with another backend (model.set_attention_backend('auto'))"
        )
    if not _FLEX_TAKES_ANY_WIDTH:
        _check_widths(q.shape[-1], v.shape[-1])
    if not k.shape[1]:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    flex = import_package(_FLEX)
    n_heads = max(k.shape[2], v.shape[2])
    k, v = (repeat_heads(one, n_heads).expand(len(q), -1, -1, -1).transpose(1, 2) for one in (k, v))
    z, log_sum = flex.flex_attention(
        q.transpose(1, 2),
        k,
        v,
        score_mod=_change_scores(softcap, term),
        block_mask=blocks,
        scale=score_scale,
        enable_gqa=q.shape[2] != n_heads,
        **({"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}),
    )
    if sinks is not None:
        log_sum = getattr(log_sum, "lse", log_sum)
        z = z * torch.sigmoid(log_sum - sinks.to(log_sum.dtype)[:, None])[..., None].to(z.dtype)
    out: Tensor = z.transpose(1, 2)
    return out


def _check_widths(*widths: int) -> None:
    """Refuse heads that `flex_attention` of PyTorch 2.6 has no kernel for."""
    bad = sorted({width for width in widths if width < 2 or width & (width - 1)})
    if bad:
        raise InputError(
            f"attention_backend='flex': heads are {' and '.join(map(str, bad))} wide, and flex_attention of PyTorch "
            f"{torch.__version__} takes powers of 2 (from 2) only: install PyTorch 2.7 or newer, or take another "
            "backend (model.set_attention_backend('auto'))"
        )


# PyTorch traces the functions that it is handed and counts their arguments: they are lambdas, which nothing is put
# around, and call nothing of ours. An index of theirs is made of tensors only: versions before 2.9 read the values of
# those that stand beside a number.


def _change_scores(softcap: float | None, term: Tensor | None) -> Callable[..., Tensor] | None:
    """What becomes of a scaled product; None: it is the score."""
    if term is None:
        return None if softcap is None else lambda score, row, head, query, key: softcap * torch.tanh(score / softcap)
    if len(term) > 1:
        if softcap is None:
            return lambda score, row, head, query, key: score + term[row, key, head]
        return lambda score, row, head, query, key: softcap * torch.tanh((score + term[row, key, head]) / softcap)
    shared = term[0]
    if softcap is None:
        return lambda score, row, head, query, key: score + shared[key, head]
    return lambda score, row, head, query, key: softcap * torch.tanh((score + shared[key, head]) / softcap)


def make_blocks(mask: Float[Tensor, "rows one some_query key"], n_query: int) -> Any:
    """What queries see, as `flex_attention` wants it; made once per call, the same for all heads."""
    by_row, by_query = mask.shape[0] > 1, mask.shape[2] > 1
    seen = mask[:, 0] == 0
    if by_row and by_query:
        sees = lambda row, head, query, key: seen[row, query, key]  # noqa: E731
    elif by_row:
        of_row = seen[:, 0]
        sees = lambda row, head, query, key: of_row[row, key]  # noqa: E731
    elif by_query:
        of_query = seen[0]
        sees = lambda row, head, query, key: of_query[query, key]  # noqa: E731
    else:
        of_all = seen[0, 0]
        sees = lambda row, head, query, key: of_all[key]  # noqa: E731
    return import_package(_FLEX).create_block_mask(
        sees,
        len(mask) if by_row else None,
        None,
        n_query,
        mask.shape[-1],
        device=mask.device,
    )
