"""States of random generators, kept, written and put back."""

import random

import numpy as np
import torch

from hooklens.training.keeping.randomness import (
    capture_random,
    keep_random,
    restore_random,
    states_from_plain,
    states_to_plain,
)


def draw() -> list[float]:
    # A normal number leaves its twin for the next call.
    return [float(torch.randn(())), float(np.random.normal()), random.gauss(0, 1), float(torch.rand(()))]


def test_through_a_file_and_back(tmp_path) -> None:
    draw()
    states = capture_random()
    expected = [draw(), draw()]
    torch.save(states_to_plain(states), tmp_path / "states")
    restore_random(states_from_plain(torch.load(tmp_path / "states", weights_only=True)))
    assert [draw(), draw()] == expected
    restore_random(states)
    assert [draw(), draw()] == expected


def test_a_block_leaves_no_trace() -> None:
    states = capture_random()
    expected = draw()
    restore_random(states)
    with keep_random():
        draw()
    assert draw() == expected
