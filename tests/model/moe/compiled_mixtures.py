"""`torch.compile` of mixtures without a graph break, forwards and backwards; test_traced.py runs this by itself.

The tracer cannot follow the checks of annotations that every other test puts on the package.
"""

import torch

from tests.model.moe.layers import MIXTURES, make_mixed_model
from tests.model.networks import random_tokens
from tests.quantised_models import plain, quantise


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


def test_quantised_maps():
    """Those that dequantise at each call, in one graph, backwards too; experts with breaks around each of them."""
    model, tokens = quantise(plain("grouped", dtype=torch.float32), "scaled"), random_tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(one(tokens).square().sum(), model.embed.table.weight)[0] for one in (compiled, model)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    layer, x = quantise(plain("mixture", dtype=torch.float32), "scaled").blocks[0].mlp, torch.randn(2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x), rtol=1e-5, atol=1e-5)
