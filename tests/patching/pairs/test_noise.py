import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching.pairs.loader import read_all_pairs
from hooklens.patching.pairs.noise import Noise
from hooklens.patching.pairs.prompts import read_pairs
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("rotary")
TOKENS = random_tokens(2, 5)


def test_every_draw_is_a_pair_of_its_own():
    pairs = read_pairs(MODEL, TOKENS, Noise(pos=[1, -1], draws=3, std=0.5))
    assert len(pairs) == 6
    assert pairs.clean.tolist() == pairs.corrupted.tolist() == TOKENS.repeat_interleave(3, 0).tolist()
    assert pairs.differ(range(6), 5).nonzero()[:, 1].tolist() == [1, 4] * 6
    added = pairs.draw_noise(range(6), 5, torch.float64)
    assert (added != 0).any(-1).tolist() == pairs.differ(range(6), 5).tolist()
    # No two draws, and no two tokens of one, are the same.
    assert len({tuple(row) for row in added[:, [1, 4]].flatten(0, 1).tolist()}) == 12


def test_noise_of_a_pair_is_the_same_in_whatever_company():
    pairs = read_pairs(MODEL, TOKENS, Noise(pos=slice(1, 3), draws=2, seed=7))
    all_of_them = pairs.draw_noise(range(4), 5, torch.float64)
    assert torch.equal(pairs.draw_noise([3], 4, torch.float64), all_of_them[3:, :4])
    assert torch.equal(pairs.take([2, 3]).draw_noise([1], 5, torch.float64), all_of_them[3:])
    again = read_pairs(MODEL, TOKENS, Noise(pos=slice(1, 3), draws=2, seed=8))
    assert not torch.equal(again.draw_noise(range(4), 5, torch.float64), all_of_them)


def test_scale_counts_in_the_spread_of_the_chosen_embeddings():
    """Over 2 x 2,000 draws of 24 numbers the spread found is within 2 % of the one asked for."""
    _, cache = MODEL.run_with_cache(TOKENS, names_filter="hook_embed")
    spread = float(cache["hook_embed"][:, 1:3].std())
    pairs = read_pairs(MODEL, TOKENS, Noise(pos=[1, 2], scale=2.0, draws=2000))
    added = pairs.draw_noise(range(4000), 5, torch.float64)[:, 1:3]
    assert float(added.std()) == pytest.approx(2.0 * spread, rel=0.02)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.02 * spread)


def test_positions_of_each_prompt_and_of_prompts_of_other_lengths():
    rows = [patching.Pair(row, row) for row in (TOKENS[0], TOKENS[1, :3])]
    pairs = read_pairs(MODEL, rows, Noise(pos=-1, draws=1))
    assert pairs.differ(range(2), 5).nonzero().tolist() == [[0, 4], [1, 2]]
    pairs = read_pairs(MODEL, rows, Noise(pos=[[0, 3], [1]], draws=1))
    assert pairs.differ(range(2), 5).nonzero().tolist() == [[0, 0], [0, 3], [1, 1]]


def test_pairs_lend_their_clean_prompts_and_answers():
    given = [patching.Pair(TOKENS[row], TOKENS[1 - row], answer=[3 + row], wrong=[5]) for row in (0, 1)]
    pairs = read_pairs(MODEL, given, Noise(pos=1, draws=2))
    assert pairs.corrupted.tolist() == TOKENS.repeat_interleave(2, 0).tolist()
    assert pairs.answers.ids.tolist() == [[3], [3], [4], [4]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pos": 1, "draws": 0}, "Noise: draws is 0, expected a whole number"),
        ({"pos": 1, "scale": 0.0}, "Noise: scale is 0.0, expected a number above 0"),
        ({"pos": 1, "std": float("nan")}, "Noise: std is nan, expected a number above 0"),
        ({"pos": None}, "Noise: pos is None; expected positions, a slice or lists of them"),
        ({"pos": []}, "Noise: pos"),
        ({"pos": [True, False]}, "is a mask"),
    ],
)
def test_noise_that_is_none(arguments, text):
    with unchecked(), pytest.raises(InputError, match=text):
        Noise(**arguments)


@pytest.mark.parametrize(
    ("pos", "text"),
    [
        (7, "Noise: pos: 7 out of range; there are 5 tokens in prompt 0, 0 to 4"),
        ([[0], [1], [2]], "lists for 3 prompts, and there are 2"),
        (slice(9, None), "chooses none of the 5 tokens of prompt 0"),
    ],
)
def test_noise_that_does_not_fit_the_prompts(pos, text):
    with pytest.raises(InputError, match=text):
        read_pairs(MODEL, TOKENS, Noise(pos=pos))


def test_pairs_that_hold_prompts_cannot_hold_noise():
    with pytest.raises(InputError, match="no Pair can hold it"):
        patching.split_pairs(MODEL, TOKENS, Noise(pos=1, draws=2))


def test_pairs_that_were_read_have_their_corrupted_prompts():
    """Others that were given beside them were dropped."""
    pairs = read_pairs(MODEL, TOKENS, Noise(pos=1, draws=2))
    assert read_all_pairs(MODEL, pairs) is pairs
    for given in ((TOKENS, None), (None, torch.ones_like(TOKENS))):
        with pytest.raises(InputError, match="pairs that were read before"):
            read_all_pairs(MODEL, pairs, *given)
