from pathlib import Path

import pytest
import torch

from hooklens.bundled import bundled_path
from hooklens.errors import InputError
from hooklens.verification.reference import LOGITS
from hooklens.verification.subject import ROUND_TRIP, Subject, describe_limits, find_folder
from tests.verification.networks import NeverFires, build


def test_a_checkpoint_and_a_model_in_memory():
    loaded = Subject.open("bundled:tiny-llama", n_tokens=8, seed=3)
    assert loaded.folder == bundled_path("tiny-llama") == find_folder("bundled:tiny-llama")
    assert loaded.name.startswith("bundled:tiny-llama (float32, ")
    assert (loaded.probe.n_tokens, loaded.probe.seed) == (8, 3)
    model = build()
    held = Subject.open(model, layers=[1])
    assert held.folder is None
    assert held.probe.model is model
    assert held.name == f"model in memory (float32, 2 layers, {len(model.hook_points())} hook points)"
    assert held.describe_sample() == [
        "hook points were checked in layers 1 of 2; layers=range(2) checks every layer"
    ]  # fmt: skip
    assert Subject.open(model).describe_sample() == []


@torch.no_grad()
def test_points_that_do_not_fire_are_left_out_of_the_rest():
    model = build()
    sound = Subject.open(model).check_firing()
    assert all(result.passed for result in sound[0])
    assert sound[1].probe.left_out == frozenset()
    assert sound[2] == []
    model.blocks[0].hook_resid_mid = NeverFires()
    model.name_hook_points()
    results, rest, notes = Subject.open(model).check_firing()
    assert [result.subject for result in results if not result.passed] == ["blocks.0.hook_resid_mid"]
    assert rest.probe.left_out == {"blocks.0.hook_resid_mid"}
    assert "left out of all other checks: 'blocks.0.hook_resid_mid'" in notes[0]
    assert "blocks.0.hook_resid_mid" not in [name for name, _ in rest.inner_stages()["hook points"]]


def test_groups_of_stages():
    subject = Subject.open(build(), n_tokens=8)
    outer = subject.outer_stages(None, (torch.float32,), logits=True)
    assert {group: len(stages) for group, stages in outer.items()} == {LOGITS: 1, ROUND_TRIP: 1}
    assert subject.outer_stages(None, (torch.float32,), logits=False)[LOGITS] == []
    inner = subject.inner_stages()
    assert len(inner["hook points"]) == len(inner["single edits"]) - 1 == len(subject.probe.names)
    assert len(inner["gradients"]) == len(inner["explicit logits"]) == 1
    assert subject.inner_stages(gradients=False)["gradients"] == []
    short = Subject.open(build(), n_tokens=4)
    assert describe_limits(subject.probe) == []
    assert short.inner_stages()["caches"] == []
    assert describe_limits(short.probe) == [
        "rows of 4 tokens: too short for checks of padding inside rows, caches and choices"
    ]  # fmt: skip


def test_refusals(tmp_path: Path):
    with pytest.raises(InputError, match="layers \\[7\\] do not exist"):
        Subject.open(build(), layers=[7])
