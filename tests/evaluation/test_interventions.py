"""Tests of hooklens.evaluation.interventions: edits as values, functions as what cannot be compared."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hooklens import edits
from hooklens.errors import HookNameError
from hooklens.evaluation.interventions import find_interventions
from tests.model.networks import make_model

STREAM = "blocks.0.hook_resid_pre"
VECTOR = torch.linspace(-1, 1, 16, dtype=torch.float64)


def look(tensor, hook):
    pass


def test_nothing_acts_on_a_model_of_its_own():
    found = find_interventions(make_model("bare"), [])
    assert (found.fingerprint, found.functions) == ("none", ())


def test_captures_only_look():
    model = make_model("bare")
    with model.capture(STREAM):
        assert find_interventions(model, []) == find_interventions(make_model("bare"), [])


DIFFERENT = [
    [edits.Zero(STREAM)],
    [edits.Zero("blocks.1.hook_resid_pre")],
    [edits.Zero("blocks.*.hook_resid_pre")],
    [edits.Zero(STREAM, pos=0)],
    [edits.Zero(STREAM, pos=slice(0, 1))],
    [edits.Zero(STREAM, pos=[0, 1])],
    [edits.Zero(STREAM, when="decode")],
    [edits.Zero("blocks.0.attn.hook_z", head=0)],
    [edits.Zero("blocks.0.attn.hook_z", head=1)],
    [edits.Scale(STREAM, 2.0)],
    [edits.Scale(STREAM, 2.5)],
    [edits.Add(STREAM, VECTOR)],
    [edits.Add(STREAM, VECTOR.flip(0))],
    [edits.Add(STREAM, torch.where(torch.arange(16) == 7, 0.0, VECTOR))],
    [edits.Add(STREAM, VECTOR.float())],
    [edits.Replace(STREAM, VECTOR)],
    [edits.Scale(STREAM, 2.0), edits.Zero(STREAM, pos=0)],
    [edits.Zero(STREAM, pos=0), edits.Scale(STREAM, 2.0)],
]


def test_edits_are_compared_by_value():
    model = make_model("bare")
    found = [find_interventions(model, given) for given in DIFFERENT]
    assert len({one.fingerprint for one in found}) == len(DIFFERENT)
    assert all(one.functions == () for one in found)
    same = [
        (edits.Zero(STREAM, pos=[0, 1]), edits.Zero(STREAM, pos=np.array([0, 1]))),
        (edits.Zero(STREAM, pos=[0, 1]), edits.Zero(STREAM, pos=torch.tensor([0, 1]))),
        (edits.Add(STREAM, VECTOR), edits.Add(STREAM, VECTOR.clone())),
        (edits.Zero(STREAM), edits.Zero(lambda name: name == STREAM)),
    ]
    for one, other in same:
        assert find_interventions(model, [one]) == find_interventions(model, [other])


@pytest.mark.parametrize("attach", ["edit", "block"])
def test_edits_that_are_attached_count(attach):
    """They acted, and results of a run without them were taken for results with them."""
    model = make_model("bare")
    found = []
    for edit in (edits.Scale(STREAM, 2.0), edits.Scale(STREAM, 3.0)):
        with model.add_edit(edit) if attach == "edit" else model.hooks(edits=[edit]):
            found.append(find_interventions(model, []))
    assert len({one.fingerprint for one in [*found, find_interventions(model, [])]}) == 3
    assert all(one.functions == () for one in found)


@dataclass(frozen=True)
class Own(edits.Zero):
    """An edit whose code may be anything."""


def test_functions_cannot_be_compared():
    model = make_model("bare")
    for given in (edits.Custom(STREAM, torch.neg), Own(STREAM), edits.Add(STREAM, VECTOR.to("meta"))):
        found = find_interventions(model, [given])
        assert found.functions == (f"{type(given).__name__} at '{STREAM}'",)
    with model.add_hook(STREAM, look):
        assert find_interventions(model, []).functions == (f"a hook at '{STREAM}'",)
    with model.hooks(fwd_hooks=[("blocks.*.hook_resid_pre", look)]):
        assert find_interventions(model, []).functions == tuple(
            f"a hook at 'blocks.{layer}.hook_resid_pre'" for layer in range(model.cfg.n_layers)
        )
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, arguments, output: None)
    assert find_interventions(model, []).functions == ("a hook of torch at blocks.0.mlp",)
    handle.remove()
    assert find_interventions(model, []).functions == ()
    with pytest.raises(HookNameError):
        find_interventions(model, [edits.Zero("blocks.99.hook_resid_pre")])
