"""Small modules with hook points, hooked and plain ones in turns."""

import torch
from torch import nn

from hooklens import HookedModule, HookPoint


class Layer(nn.Module):
    """A plain module between two hooked ones."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.hook_out = HookPoint()

    def forward(self, x):
        return self.hook_out(torch.relu(self.linear(x)))


class Toy(HookedModule):
    def __init__(self, width=4, depth=2):
        super().__init__()
        self.hook_in = HookPoint()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, 3), HookPoint())

    def forward(self, x, *, scale=1.0):
        x = self.hook_in(x)
        for layer in self.layers:
            x = layer(x)
        return scale * self.head(x)


def told_names(toy, x=None):
    """The names that hook functions are told, in the order in which the points fire."""
    seen = []
    toy.run_with_hooks(torch.randn(2, 4) if x is None else x, fwd_hooks=[("*", lambda t, hook: seen.append(hook.name))])
    return seen
