"""A function is called in one of three forms, at hooks and in `edits.Custom` alike, which its signature decides."""

import copy
import functools
import pickle

import pytest
import torch

from hooklens import HookPoint, edits
from hooklens.errors import EditError, HookLensError
from hooklens.hooks.call import read_form
from tests.annotations import unchecked
from tests.hooks.toys import Toy
from tests.model.networks import make_model, random_tokens

NAME = "blocks.0.hook_resid_post"
MODEL = make_model("grouped").requires_grad_(requires_grad=False)
IDS = random_tokens(2, 5, seed=1)
seen: list[object] = []


def alone(tensor):
    return tensor * 2


def behind(tensor, point):
    seen.append(point.name)
    return tensor * 2


def by_keyword(tensor, *, hook):
    seen.append(hook.name)
    return tensor * 2


def by_name(tensor, scale=2, hook=None):
    seen.append(hook.name)
    return tensor * scale


def scaled(tensor, scale):
    return tensor * scale


def in_place(tensor):
    tensor.mul_(2)


def in_place_with_point(tensor, hook):
    seen.append(hook.name)
    tensor.mul_(2)


class Doubler:
    def __call__(self, tensor):
        return tensor * 2

    def with_hook(self, tensor, hook):
        seen.append(hook.name)
        return tensor * 2

    @staticmethod
    def static(tensor):
        return tensor * 2


class Doubling(torch.nn.Module):
    def forward(self, tensor):
        return tensor * 2


class DoublingAt(torch.nn.Module):
    def forward(self, tensor, hook):
        seen.append(hook.name)
        return tensor * 2


FORMS = {
    "alone": (alone, "tensor"),
    "behind": (behind, "point"),
    "by keyword": (by_keyword, "hook="),
    "by name, somewhere": (by_name, "hook="),
    "in place": (in_place, "tensor"),
    "in place, with the point": (in_place_with_point, "hook="),
    "a lambda": (lambda tensor: tensor * 2, "tensor"),
    "a lambda with the point": (lambda t, p: seen.append(p.name) or t * 2, "point"),
    "a partial that binds the second": (functools.partial(scaled, scale=2), "tensor"),
    "a partial with the point": (functools.partial(lambda k, t, hook: seen.append(hook.name) or t * k, 2), "hook="),
    "an object": (Doubler(), "tensor"),
    "a bound method": (Doubler().with_hook, "hook="),
    "a static method": (Doubler.static, "tensor"),
    "a module": (Doubling(), "tensor"),
    "a module with the point": (DoublingAt(), "hook="),
}


@pytest.mark.parametrize("name", FORMS)
def test_hooks_and_custom_edits_take_the_same_functions(name):
    """Custom took `fn(tensor)` alone, and refused None; hooks took `fn(tensor, hook)` alone."""
    fn, form = FORMS[name]
    expected = MODEL.run_with_hooks(IDS, edits=[edits.Scale(NAME, 2.0)])
    calls = {
        "hook": lambda: MODEL.run_with_hooks(IDS, fwd_hooks=[(NAME, fn)]),
        "edit": lambda: MODEL.run_with_hooks(IDS, edits=[edits.Custom(NAME, fn)]),
        "edit of all positions": lambda: MODEL.run_with_hooks(IDS, edits=[edits.Custom(NAME, fn, pos=slice(None))]),
    }
    for call in calls.values():
        seen.clear()
        assert torch.equal(call(), expected)
        assert seen == ([] if form == "tensor" else [NAME])
    with MODEL.hooks(fwd_hooks=[(NAME, fn)]):
        assert torch.equal(MODEL(IDS), expected)
    with MODEL.add_hook(NAME, fn):
        assert torch.equal(MODEL(IDS), expected)
    with MODEL.add_edit(edits.Custom(NAME, fn)):
        assert torch.equal(MODEL(IDS), expected)
    assert read_form(fn, else_form="point") == read_form(fn, else_form="tensor") == form


def test_what_could_be_called_either_way():
    """A hook is told its point, as ever, and an edit's function keeps its default."""

    def open_(tensor, second=None):
        seen.append(second)

    seen.clear()
    MODEL.run_with_hooks(IDS, fwd_hooks=[(NAME, open_)], edits=[edits.Custom(NAME, open_)])
    assert isinstance(seen[0], HookPoint)
    assert seen[1:] == [None]
    assert read_form(lambda *given: None, else_form="point") == "point"
    assert read_form(lambda *given: None, else_form="tensor") == "tensor"


def test_built_in_functions():
    """`torch.neg` was called with the hook point as its second argument."""
    expected = MODEL.run_with_hooks(IDS, edits=[edits.Scale(NAME, -1.0)])
    assert torch.equal(MODEL.run_with_hooks(IDS, fwd_hooks=[(NAME, torch.neg)]), expected)
    assert torch.equal(MODEL.run_with_hooks(IDS, edits=[edits.Custom(NAME, torch.neg)]), expected)


def test_a_function_that_gives_none_keeps_the_tensor():
    plain, shapes = MODEL(IDS), []
    for options in ({}, {"pos": -1}):
        edit = edits.Custom(NAME, lambda tensor: shapes.append(list(tensor.shape)), **options)
        assert torch.equal(MODEL.run_with_hooks(IDS, edits=[edit]), plain)
    assert shapes == [[2, 5, MODEL.cfg.d_model], [2, MODEL.cfg.d_model]]


def test_a_position_edited_in_place():
    def zero(tensor):
        tensor.zero_()

    found = MODEL.run_with_hooks(IDS, edits=[edits.Custom(NAME, zero, pos=1)])
    assert torch.equal(found, MODEL.run_with_hooks(IDS, edits=[edits.Zero(NAME, pos=1)]))


@pytest.mark.parametrize("fn", [lambda: None, lambda hook: None, lambda a, b, c: None, lambda t, *, scale: None])
def test_wrong_arity_is_told_before_any_forward(fn):
    ran = []
    message = r"is called as fn\(tensor\), fn\(tensor, point\) or fn\(tensor, hook=point\); <lambda>\(.*\) cannot be"
    with pytest.raises(EditError, match=rf"edit Custom\('{NAME}'\): fn {message}"):
        edits.Custom(NAME, fn)
    hooks = [("hook_embed", lambda tensor: ran.append(1)), (NAME, fn)]
    with pytest.raises(HookLensError, match=f"a hook {message}"):
        MODEL.run_with_hooks(IDS, fwd_hooks=hooks)
    with pytest.raises(HookLensError, match=f"a hook {message}"):
        MODEL.add_hook(NAME, fn)
    assert ran == []
    assert MODEL.list_hooks() == {}


@pytest.mark.parametrize("fn", [None, 3, "fn", torch.Tensor])
def test_what_is_no_function(fn):
    with unchecked(), pytest.raises(EditError, match=r"fn is .*, expected a function fn\(tensor\) or fn\(tensor, hook"):
        edits.Custom(NAME, fn)


def test_the_form_is_read_once_for_an_edit_and_goes_with_its_copies(monkeypatch):
    edit = edits.Custom(NAME, by_keyword)
    copies = [edit, copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))]
    expected = MODEL.run_with_hooks(IDS, edits=[edits.Scale(NAME, 2.0)])

    def refuse(*given, **options):
        raise AssertionError("read again")

    monkeypatch.setattr(edits, "read_form", refuse)
    for one in copies:
        assert one == edit
        assert torch.equal(MODEL.run_with_hooks(IDS, edits=[one]), expected)


def test_gradient_hooks_take_the_same_functions():
    toy, name = Toy(), "layers.0.hook_out"
    x = torch.ones(2, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(toy(x).sum(), x)
    for fn in (lambda gradient: gradient * 5, lambda gradient, hook: gradient * 5):
        (found,) = torch.autograd.grad(toy.run_with_hooks(x, bwd_hooks=[(name, fn)]).sum(), x)
        torch.testing.assert_close(found, plain * 5)
