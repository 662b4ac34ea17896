"""Maps with adapters beside them, against the plain formula in torch."""

import pytest
import torch
from torch import nn

from hooklens.axes import HookSite
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.call import Hook, Listening
from hooklens.model.parts.adapted import AdapterSwitch, adapted_maps, base_map, whole_weight
from hooklens.model.parts.adapted_layers import LoraTensors, adapt, replace_in, show_at, take_out

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def draw_map(rank, d_in):
    made = nn.Linear(d_in, rank, bias=False, dtype=torch.float64)
    made.weight = draw(rank, d_in)
    return made


class Holder(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own


@pytest.fixture
def holder():
    made = Holder(nn.Linear(5, 6, dtype=torch.float64))
    layer = adapt(made, "own", AdapterSwitch(), {"head": 2, "d_head": 3})
    show_at(layer, HookPoint(HookSite(template="own.hook_lora_out", axes=("batch", "head", "d_head"), description="")))
    layer.add("plain", LoraTensors(draw_map(2, 5), draw(6, 2), 0.7, bias=draw(6)))
    layer.add(
        "lengths", LoraTensors(draw_map(3, 5), draw(6, 3), 1.3, magnitude=nn.Parameter(torch.rand(6).double() + 1))
    )
    return made


@pytest.mark.parametrize("names", [[], ["plain"], ["lengths"], ["plain", "lengths"], ["lengths", "plain"]])
def test_one_weight_gives_the_same(holder, names):
    layer, x = holder.own, torch.randn(4, 5, dtype=torch.float64)
    layer.set_adapter(names)
    expected = nn.functional.linear(x, layer.effective_weight(), layer.effective_bias())
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(whole_weight(layer), layer.effective_weight(), **EXACT)


def test_peft_computes_the_same(holder):
    """Its own forward, on the very layer."""
    import peft

    layer, x = holder.own, torch.randn(4, 5, dtype=torch.float64)
    for names in (["plain"], ["lengths"], ["plain", "lengths"]):
        layer.set_adapter(names)
        torch.testing.assert_close(layer(x), peft.tuners.lora.Linear.forward(layer, x), **EXACT)


def test_a_bias_and_a_weight_in_the_place_of_its_own(holder):
    layer, x = holder.own, torch.randn(4, 5, dtype=torch.float64)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    replace_in(layer, "other", "weight", weight, trains=True)
    replace_in(layer, "other", "bias", bias, trains=True)
    own = layer(x)
    layer.set_adapter(["other"])
    torch.testing.assert_close(layer(x), x @ weight.T + bias, **EXACT)
    layer.set_adapter(["lengths", "other"])
    expected = nn.functional.linear(x, layer.effective_weight(), layer.effective_bias())
    torch.testing.assert_close(layer(x), expected, **EXACT)
    layer.set_adapter([])
    assert torch.equal(layer(x), own)


def test_nothing_is_made_for_nobody(holder):
    """Switched off, with nobody listening, the map computes what it did, and no tensor besides."""
    layer, x = holder.own, torch.randn(4, 5, dtype=torch.float64)
    with torch.profiler.profile() as profile:
        layer(x, Call())
    made = {event.key for event in profile.key_averages()}
    assert not made & {"aten::zeros", "aten::zeros_like", "aten::add", "aten::mul"}


def test_the_point_shows_heads_and_fires_where_nobody_acts(holder):
    layer, x, seen = holder.own, torch.randn(4, 5, dtype=torch.float64), []
    point = layer.hook_lora_out
    call = Call({point: Listening([Hook(lambda tensor, hook: seen.append(tensor), point)])})
    own = layer(x)
    assert torch.equal(layer(x, call), own)
    layer.set_adapter(["plain"])
    assert torch.equal(layer(x, call), layer(x))
    assert [tuple(one.shape) for one in seen] == [(4, 2, 3)] * 2
    assert not seen[0].any()
    torch.testing.assert_close(own + seen[1].flatten(1), layer(x), **EXACT)
    # Without a call nobody hears it.
    layer(x)
    assert len(seen) == 2


def test_taken_out_the_map_stands_in_its_place_again(holder):
    layer = holder.own
    base = base_map(layer)
    take_out(holder, "own", layer, "plain")
    assert list(adapted_maps(holder)) == ["own"]
    take_out(holder, "own", layer, "lengths")
    assert holder.own is base
