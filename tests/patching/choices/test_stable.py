import torch

from hooklens.patching import EdgeChoice, ScoredEdges
from hooklens.patching.choices.stable import selection_frequency
from tests.model.networks import make_config

CFG = make_config(n_layers=1, n_heads=2)
EDGES = ScoredEdges.of(CFG, {})


def test_the_frequency_is_that_of_draws_with_replacement():
    """Of 4 pairs one has an edge of score 8; the other edge always 1. The first is chosen where that pair is drawn
    at all: 1 - (3/4)^4 = 0.684; over 2,000 draws the spread is 0.01."""
    per_pair = torch.zeros(*EDGES.exists.shape, 4, dtype=torch.float64)
    logits, mlp = EDGES.readers.index("logits"), EDGES.readers.index("m0")
    per_pair[0, mlp, 0] = 8.0
    per_pair[0, logits] = 1.0
    found = selection_frequency(EDGES, per_pair, 1, choice=EdgeChoice(search="top"), n_draws=2000, seed=0)
    assert abs(float(found[0, mlp]) - (1 - 0.75**4)) < 0.04
    assert float(found.sum()) == 1.0
    again = selection_frequency(EDGES, per_pair, 1, choice=EdgeChoice(search="top"), n_draws=2000, seed=0)
    assert torch.equal(found, again)


def test_what_all_pairs_agree_on_is_always_chosen():
    per_pair = EDGES.exists.double()[..., None] * torch.arange(EDGES.exists.numel()).view(*EDGES.exists.shape, 1)
    found = selection_frequency(EDGES, per_pair.expand(-1, -1, 5), 3, choice=EdgeChoice(), n_draws=9, seed=1)
    assert sorted(set(found.flatten().tolist())) == [0.0, 1.0]
    assert float(found.sum()) == 3.0
