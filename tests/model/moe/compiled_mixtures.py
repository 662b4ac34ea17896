"""`torch.compile` of mixtures without a graph break, forwards and backwards; test_traced.py runs this by itself.

The tracer cannot follow the checks of annotations that every other test puts on the package.
"""

import torch

from tests.model.moe.layers import MIXTURES, make_mixed_model
from tests.model.networks import random_tokens


def test_same_numbers_and_gradients_in_one_graph():
    model = make_mixed_model(MIXTURES["gated shared expert"], n_layers=1)
    tokens = random_tokens(2, 6)
    model(tokens).square().sum().backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens)
    out.square().sum().backward()
    torch.testing.assert_close(out, model(tokens), rtol=1e-12, atol=1e-12)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-10, atol=1e-10)
