"""Stacks of vectors that callers bring, fitted to the norm that they are read through."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.arguments import choose
from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.memory import take
from hooklens.activation_cache.readout import FrozenNorm, freeze_norm
from hooklens.activation_cache.stream import StreamPoint
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice, read_choice


def fit_norm(
    cache: CapturedActivations,
    stack: Float[Tensor, "*components_batch_pos d_model"],
    point: StreamPoint,
    *,
    pos_slice: Choice,
    batch_slice: Choice,
    has_batch_dim: bool,
) -> tuple[Float[Tensor, "*components_taken d_model"], FrozenNorm | None, torch.Size]:
    """The rows of a stack that are asked for, the norm at a place with their scale, and the sizes of batch and pos.

    Arguments are those of `ActivationCache.apply_ln_to_stack`; the norm is None where the stream is read as it is.

    Raises:
        MissingActivationError: the norm's `hook_scale` was not captured.
        CacheError: the shapes do not fit.
    """
    if not isinstance(stack, Tensor) or not stack.is_floating_point():
        found = stack.dtype if isinstance(stack, Tensor) else f"a {type(stack).__name__}"
        raise CacheError(f"residual_stack is {found}; expected a floating tensor [*components, batch, pos, d_model]")
    one_position = isinstance(read_choice(pos_slice, what="pos_slice", refuse_tuple=True), int)
    row_axis = -2 if one_position else -3
    if batch_slice is not None and not cache.has_batch_dim:
        raise CacheError(f"batch_slice={batch_slice!r}: this cache has no batch axis; leave it out")
    if batch_slice is not None and has_batch_dim:
        stack = _take_rows(stack, row_axis, batch_slice, "the stack")
    if point.norm is None:
        has_rows = cache.has_batch_dim and has_batch_dim and not isinstance(read_choice(batch_slice, what=""), int)
        n_lead = has_rows + (not one_position)
        if stack.ndim <= n_lead or stack.shape[-1] != cache.cfg.d_model:
            raise CacheError(
                f"the stack has shape {list(stack.shape)}; expected [*components, "
                f"{'batch, ' * has_rows}{'' if one_position else 'pos, '}{cache.cfg.d_model}]"
            )
        return stack, None, stack.shape[stack.ndim - 1 - n_lead : -1]
    norm = freeze_norm(cache, point.norm, pos_slice=pos_slice, purpose="apply_ln_to_stack")
    if batch_slice is not None:
        norm = replace(norm, scale=_take_rows(norm.scale, row_axis, batch_slice, "this cache"))
    elif cache.has_batch_dim and not has_batch_dim and norm.scale.shape[row_axis] == 1:
        norm = replace(norm, scale=norm.scale.select(row_axis, 0))
    _check_shape(stack, norm)
    return stack, norm, norm.scale.shape[:-1]


def _take_rows(tensor: Tensor, axis: int, rows: Choice, where: str) -> Tensor:
    if tensor.ndim < -axis:
        raise CacheError(
            f"batch_slice={rows!r}: {where} has shape {list(tensor.shape)}, without an axis of rows; expected "
            f"[*components, batch, {'d_model' if axis == -2 else 'pos, d_model'}], or has_batch_dim=False"
        )
    chosen, single = choose(rows, tensor.shape[axis], what="batch_slice", noun=f"rows of {where}")
    return tensor.select(axis, chosen[0]) if single else take(tensor, axis, chosen)


def _check_shape(stack: Tensor, norm: FrozenNorm) -> None:
    expected = [*norm.scale.shape[:-1], len(norm.gain)]
    found = stack.shape[-len(expected) :]
    fits = len(found) == len(expected) and found[-1] == expected[-1]
    # A component may be the same at all rows or positions, with an axis of size 1.
    if not fits or any(size not in (1, wanted) for size, wanted in zip(found, expected, strict=True)):
        raise CacheError(
            f"the stack has shape {list(stack.shape)}, the norm's scale batch and pos axes {expected[:-1]}; expected "
            f"[*components, {str(expected)[1:-1]}] with any number of component axes: give the pos_slice and "
            "batch_slice that the stack was cut by, and has_batch_dim=False for one without rows"
        )
