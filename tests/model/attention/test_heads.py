"""Tests of hooklens.model.attention.heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hooklens.model.attention.heads import project_heads


class Doubled(nn.Linear):
    """A map with something around it, which sees what callers of a linear map give it."""

    def forward(self, x):
        assert x.ndim == 3
        return 2 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "lay_out",
    [lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[:1].expand(3, -1, -1)],
    ids=["contiguous", "transposed", "expanded"],
)
def test_heads_are_those_of_the_linear_map_bit_for_bit(dtype, bias, lay_out):
    linear = nn.Linear(8, 12, bias=bias).to(dtype)
    x = lay_out(torch.randn(3, 5, 8).to(dtype)).requires_grad_()
    found = project_heads(x, linear, 4)
    assert found.shape == (3, 5, 3, 4)
    assert torch.equal(found.flatten(2), F.linear(x, linear.weight, linear.bias))
    found.sum().backward()
    gradients = x.grad, linear.weight.grad
    x.grad = linear.weight.grad = None
    F.linear(x, linear.weight, linear.bias).sum().backward()
    assert all(map(torch.equal, gradients, (x.grad, linear.weight.grad)))


def test_what_stands_around_a_map_sees_rows_and_positions():
    around = Doubled(8, 12)
    x = torch.randn(3, 5, 8)
    assert torch.equal(project_heads(x, around, 4).flatten(2), 2 * F.linear(x, around.weight, around.bias))


def count_backward_nodes(output):
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def test_heads_take_two_views():
    """The map parted rows and positions, which the heads parted again: a node more for the backward pass."""
    linear, x = nn.Linear(8, 12), torch.randn(3, 5, 8, requires_grad=True)
    whole = F.linear(x, linear.weight, linear.bias)
    # The map, with its own view on either side, and the heads.
    assert count_backward_nodes(project_heads(x, linear, 4)) < count_backward_nodes(whole.view(3, 5, 3, 4))
