"""Every experiment takes pairs in place of clean and corrupted prompts: a Pair, a list of them, or a loader."""

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import LogitDiff, Pair
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
LENGTHS = (5, 4, 6)
ANSWERS, WRONGS = (3, 4, 5), (6, 7, 8)
CIRCUITS = {"full": patching.Circuit.full(MODEL.cfg), "one": patching.Circuit([("embed", "logits")])}
EXPERIMENTS = {
    "sweep": lambda *prompts, **given: patching.sweep(MODEL, *prompts, sites=patching.grid("z"), **given).per_pair,
    "attribution": lambda *prompts, **given: (
        patching.attribution(MODEL, *prompts, sites=patching.grid("z"), **given).per_pair
    ),
    "edge_attribution": lambda *prompts, **given: patching.edge_attribution(MODEL, *prompts, **given).per_pair,
    "exact edges": lambda *prompts, **given: (
        patching.edge_attribution(MODEL, *prompts, method="exact", **given).per_pair
    ),
    "path_patch": lambda *prompts, **given: (
        patching.path_patch(MODEL, *prompts, senders=["a0.h1", "m0"], receivers=["a1.h0.q", "logits"], **given).per_pair
    ),
    "evaluate_circuits": lambda *prompts, **given: (
        patching.evaluate_circuits(MODEL, *prompts, circuits=CIRCUITS, **given).per_pair
    ),
    "faithfulness_curve": lambda *prompts, **given: (
        patching.faithfulness_curve(MODEL, *prompts, scores=SCORES, sizes=[3, 9], **given).result.per_pair
    ),
    "discover_circuit": lambda *prompts, **given: torch.tensor(
        patching.discover_circuit(MODEL, *prompts, threshold=0.05, holdout=0, **given).damage
    ),
}


def two_sides():
    sides = [[row[:n] for row, n in zip(random_tokens(3, 6, seed=seed), LENGTHS, strict=True)] for seed in (1, 2)]
    return list(zip(*sides, strict=True))


PAIRS = [
    Pair(clean, corrupted, answer=answer, wrong=wrong)
    for (clean, corrupted), answer, wrong in zip(two_sides(), ANSWERS, WRONGS, strict=True)
]
CLEAN, CORRUPTED, MASK = patching.stack_pairs(PAIRS)
METRIC = LogitDiff(list(ANSWERS), list(WRONGS))
SCORES = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, attention_mask=MASK, progress=False)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_pairs_and_loaders_give_what_two_batches_give(experiment):
    expected = experiment(CLEAN, CORRUPTED, metric=METRIC, attention_mask=MASK, progress=False)
    for pairs in (PAIRS, iter([PAIRS[:2], PAIRS[2]]), (pair for pair in PAIRS)):
        found = experiment(pairs, metric=LogitDiff(), progress=False)
        # Groups of pairs are padded to another width, in float64.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    first = experiment(PAIRS[0], metric=LogitDiff(), progress=False)
    if first.ndim:
        torch.testing.assert_close(first, expected[..., :1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("exact edges", "discover_circuit")])
def test_what_is_missing_is_said(name):
    call = getattr(patching, name)
    with unchecked(), pytest.raises(InputError, match=rf"{name}: .*metric missing; write {name}\(model, clean, corr"):
        call(MODEL, PAIRS)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_prompts_without_their_other_side_are_refused(experiment):
    with pytest.raises(InputError, match="the corrupted prompts are missing"):
        experiment(CLEAN, metric=METRIC, progress=False)
