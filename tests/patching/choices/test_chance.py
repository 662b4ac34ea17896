import random
from itertools import pairwise

import pytest
import torch

from hooklens.errors import HookLensError, InputError
from hooklens.patching import Circuit, EdgeChoice, ScoredEdges, random_circuits
from hooklens.patching.choices.chance import grow_by_paths
from tests.model.networks import ALL_CONFIGS, make_config

CFG = ALL_CONFIGS["grouped"]
EDGES = ScoredEdges.of(CFG, {})


@pytest.mark.parametrize("search", ["greedy", "top", "pruned", "optimal"])
def test_random_circuits_are_of_the_sizes_and_connected_as_the_choice_connects(search):
    sizes = [0, 1, 2, 3, 9, 40, 81, 82]
    choice = EdgeChoice(search=search)
    before = torch.random.get_rng_state(), random.getstate()
    drawn = random_circuits(EDGES, sizes, choice=choice, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [len(circuit) for circuit in drawn] == sizes
    assert drawn == random_circuits(EDGES, sizes, choice=choice, seed=4)
    assert drawn[4] != random_circuits(EDGES, sizes, choice=choice, seed=5)[4]
    if search in ("pruned", "optimal"):
        assert all(circuit.pruned(CFG) == circuit for circuit in drawn)
    else:
        assert all(small <= large for small, large in pairwise(drawn))
    if search == "greedy":
        fed = {reader for writer, _ in drawn[4] for reader in EDGES.inputs[writer]} | {"logits"}
        assert {reader for _, reader in drawn[4]} <= fed


def test_no_edge_is_preferred():
    """Each of the 82 edges is among the 41 of a draw with probability 1/2: 300 draws leave a spread of 0.03."""
    counts = torch.zeros(EDGES.exists.shape)
    for seed in range(300):
        [drawn] = random_circuits(EDGES, [41], choice=EdgeChoice(search="top"), seed=seed)
        counts += EDGES.to_mask(drawn)
    shares = counts[EDGES.exists] / 300
    assert 0.35 < float(shares.min()) <= float(shares.max()) < 0.65


def test_paths_reach_every_edge():
    seen = Circuit()
    generator = random.Random(0)
    for _ in range(200):
        seen = seen | grow_by_paths(EDGES, 12, generator)
    assert seen == Circuit.full(CFG)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match=r"random_circuits: a size is 83, expected a whole number, 0 to 82"):
        random_circuits(EDGES, [83])
    lacking = ScoredEdges.of(make_config(n_layers=1, n_heads=1, attn_only=True), {})
    with pytest.raises(HookLensError, match=r"20 draws gave no circuit of 9 of 5 edges"):
        grow_by_paths(lacking, 9, random.Random(0))
