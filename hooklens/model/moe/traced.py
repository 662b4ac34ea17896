"""The product of sorted pairs with their experts' maps as one operation, for graphs that `torch.compile` traces.

How many pairs an expert has is known only while the graph runs, so what the tracer sees is one operation whose inside
it does not look into. It has a backward, not a second one.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def _sizes(ends: Tensor) -> list[int]:
    numbers = ends.tolist()
    return [end - start for start, end in zip([0, *numbers], numbers, strict=False)]


def multiply_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x W_e^T` with the map of each row's expert.

    Args:
        x: `[pair into]`, sorted by expert.
        weight: `[expert out_of into]`.
        ends: `[expert]`, one past the last row of each expert.
    """
    made = x.new_empty(x.shape[0], weight.shape[1])
    sizes = _sizes(ends)
    for part, into, one in zip(torch.split(x, sizes), torch.split(made, sizes), weight, strict=True):
        torch.mm(part, one.T, out=into)
    return made


def multiply_within_groups(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """`x_e^T y_e` over the rows of each expert, `[expert, of x, of y]`: the gradient of the maps."""
    made = x.new_empty(ends.shape[0], x.shape[1], y.shape[1])
    sizes = _sizes(ends)
    for part, other, into in zip(torch.split(x, sizes), torch.split(y, sizes), made, strict=True):
        torch.mm(part.T, other, out=into)
    return made


def _shape_of_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _shape_within_groups(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _go_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    operations = torch.ops.hooklens
    return (
        operations.multiply_groups(gradient, weight.mT, ends),
        operations.multiply_within_groups(gradient, x, ends),
        None,
    )


@cache
def declare_operations() -> None:
    """Make the operations known as `torch.ops.hooklens.multiply_groups` and `multiply_within_groups`, once."""
    for name, run, shape in (
        ("multiply_groups", multiply_groups, _shape_of_groups),
        ("multiply_within_groups", multiply_within_groups, _shape_within_groups),
    ):
        schema = "(Tensor x, Tensor y, Tensor ends) -> Tensor"
        operation = torch.library.custom_op(f"hooklens::{name}", run, mutates_args=(), schema=schema)
        operation.register_fake(shape)
        if run is multiply_groups:
            operation.register_autograd(_go_back, setup_context=_keep)
