"""A tree of modules knows its hook points by name, whatever is done to the tree."""

import pytest
import torch
from torch import nn

from hooklens import HookPoint
from hooklens.hooks.call import thread_listeners
from tests.hooks.toys import Layer, Toy, told_names
from tests.model.networks import CONFIGS, make_model


@pytest.mark.parametrize(
    "change",
    [
        lambda toy: setattr(toy, "head", Toy(width=4)),
        lambda toy: toy.layers.append(Layer(4)),
        lambda toy: toy.layers.__setitem__(0, nn.Identity()),
        lambda toy: toy.layers.__delitem__(0),
        lambda toy: setattr(toy.layers[1], "hook_out", HookPoint()),
        lambda toy: setattr(toy.layers[1], "hook_more", HookPoint()),
        lambda toy: delattr(toy.layers[0], "hook_out"),
        lambda toy: delattr(toy, "hook_in"),
        lambda toy: setattr(toy, "hook_in", None),
        lambda toy: toy.add_module("extra", HookPoint()),
        lambda toy: toy.register_module("extra", Layer(4)),
        lambda toy: toy.head.append(HookPoint()),
    ],
)
def test_changes_of_the_tree_are_noticed(change):
    toy = Toy()
    toy.hook_points()
    change(toy)
    expected = {name: module for name, module in toy.named_modules() if isinstance(module, HookPoint)}
    assert toy.hook_points() == expected
    assert toy.select_hook_points("*") == expected
    with toy.hooks([("*", lambda t, hook: None)]):
        told = {hook.point.name for listening in thread_listeners().values() for hook in listening.hooks}
    assert told == set(expected)


def test_swapped_layers_swap_names():
    """An nn.ModuleList is no HookedModule, and takes its items without telling one."""
    toy, x = Toy(), torch.randn(2, 4)
    first, second = toy.layers
    toy.hook_points()
    toy.layers[0], toy.layers[1] = second, first
    assert toy.hook_points()["layers.0.hook_out"] is second.hook_out
    with toy.capture("layers.0.hook_out") as captured:
        assert told_names(toy, x) == ["hook_in", "layers.0.hook_out", "layers.1.hook_out", "head.1"]
    assert torch.equal(captured["layers.0.hook_out"], second(x))


def test_a_submodule_set_to_none_is_gone():
    """Submodules also stand in the instance's own dictionary, which kept the old one."""
    toy = Toy()
    toy.head = None
    assert toy.head is None
    toy.head = nn.Identity()
    assert isinstance(toy.head, nn.Identity)
    del toy.head
    assert not hasattr(toy, "head")


def test_the_table_of_hook_points_is_made_once():
    model = make_model(CONFIGS["rotary"])
    assert model._hook_point_table() is model._hook_point_table()
    assert model.hook_points() is not model.hook_points()
