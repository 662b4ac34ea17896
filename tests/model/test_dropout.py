"""Tests of dropout: what is dropped, how often, and that watching it changes nothing."""

import math

import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.config import AlibiPositions, LearnedPositions, RotaryPositions
from hooklens.errors import CacheError, ConfigError, InputError
from hooklens.verification import verify
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

TOKENS = random_tokens(3, 6)
ALL = {"embed_dropout": 0.2, "attn_dropout": 0.3, "resid_dropout": 0.1}
# Logits of float64 sums in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def build(**changes) -> HookedCausalLM:
    return make_model(make_config(**{"positions": LearnedPositions(), **ALL, **changes}))


def seeded(run, seed: int = 5):
    torch.manual_seed(seed)
    return run(), torch.rand(1)


def test_it_is_off_outside_of_training():
    model = build()
    plain = HookedCausalLM.from_state_dict(model.state_dict(), model.cfg.replace(**dict.fromkeys(ALL, 0.0)))
    state = torch.get_rng_state()
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(model.eval()(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("positions", [LearnedPositions(), RotaryPositions(dim=4), AlibiPositions()])
@pytest.mark.parametrize("names", [["*"], ["pattern"], ["attn_scores"], ["hook_embed"], ["*out"], ["result"]])
def test_watching_changes_nothing(names, positions):
    """The same logits, bit for bit, from the same random numbers, of which as many are drawn."""
    model = build(positions=positions).train()
    (expected, next_expected), ((found, _), next_found) = (
        seeded(lambda: model(TOKENS)),
        seeded(lambda: model.run_with_cache(TOKENS, names_filter=names)),
    )
    assert torch.equal(found, expected)
    assert torch.equal(next_found, next_expected)


def test_hook_points_show_what_is_used():
    """The pattern shown is the dropped one that weighs the values, and the stream the sum of what is shown."""
    model = build().train()
    _, cache = model.run_with_cache(TOKENS, names_filter="*")
    for layer in range(2):
        pattern, v = cache["pattern", layer], cache["v", layer]
        torch.testing.assert_close(torch.einsum("bnqk,bknh->bqnh", pattern, v), cache["z", layer], **CLOSE)
        whole = cache["attn_scores", layer].softmax(-1)
        kept = pattern != 0
        torch.testing.assert_close(pattern[kept], whole[kept] / 0.7, **CLOSE)
        written = cache["result", layer].sum(2) + model.blocks[layer].attn.b_O
        kept = cache["attn_out", layer] != 0
        torch.testing.assert_close(cache["attn_out", layer][kept], written[kept] / 0.9, **CLOSE)
        assert 0 < (~kept).sum() < 0.3 * kept.numel()
    total = cache.decompose_resid(apply_ln=False).sum(0)
    torch.testing.assert_close(total, cache["resid_post", -1], **CLOSE)
    assert torch.equal(cache["hook_embed"] == 0, cache["hook_pos_embed"] == 0)


@pytest.mark.parametrize(
    ("option", "name"),
    [("embed_dropout", "hook_embed"), ("attn_dropout", "pattern0"), ("resid_dropout", "blocks.0.hook_attn_out")],
)
def test_statistics(option, name):
    """The share that is dropped, and a mean that stays: both within five standard errors."""
    model = build(**{**dict.fromkeys(ALL, 0.0), option: 0.25})
    tokens = random_tokens(200, 8)
    _, cache = model.run_with_cache(tokens, names_filter=name)
    _, dropped = model.train().run_with_cache(tokens, names_filter=name)
    (before,), (after,) = cache.values(), dropped.values()
    present = before != 0
    n = int(present.sum())
    share = float((after[present] == 0).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    kept = present & (after != 0)
    torch.testing.assert_close(after[kept], before[kept] / 0.75, **CLOSE)
    error = float((before[present] ** 2).sum() * (0.25 / 0.75)) ** 0.5
    assert abs(float((after - before).sum())) < 5 * error


def test_two_draws_differ_and_the_seed_fixes_them():
    model = build().train()
    one, again, other = (seeded(lambda: model(TOKENS), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_gradients_go_through_what_was_kept():
    model = build().train()
    tokens = TOKENS[:1, :2]
    with model.capture(["hook_embed"], incl_bwd=True) as captured:
        model(tokens)[..., 0].sum().backward()
    used = sorted(set(tokens.flatten().tolist()))
    for token in used:
        at = (tokens[0] == token).nonzero().flatten()
        dropped = (captured["hook_embed"][0, at] == 0).all(0)
        assert not model.embed.W_E.grad[token][dropped].any()
    assert model.embed.W_E.grad.any()


def test_what_needs_two_equal_runs_is_refused():
    model = build().train()
    with pytest.raises(CacheError, match=r"training mode with dropout.*model\.eval\(\)"):
        model.prefill(TOKENS)
    with pytest.raises(CacheError, match="training mode with dropout"):
        model.generate(TOKENS, max_new_tokens=2, verbose=False)
    with pytest.raises(InputError, match="training mode with dropout"):
        verify(model, progress=False)
    metric = patching.LogitDiff([1], [2])
    with pytest.raises(InputError, match="training mode with dropout"):
        patching.sweep(model, TOKENS, TOKENS, "z", metric, allow_training=True, progress=False)
    assert not build(**dict.fromkeys(ALL, 0.0)).train().drops


@pytest.mark.parametrize("wrong", [1.0, -0.1, True, "0.1", float("nan")])
def test_what_is_no_share_is_refused(wrong):
    with unchecked(), pytest.raises(ConfigError, match="expected the share of entries dropped, from 0 to below 1"):
        make_config(resid_dropout=wrong)


def test_a_config_keeps_it_and_is_equal_without():
    """What is dropped in training is no part of what a network computes: caches and checkpoints go together."""
    cfg, plain = make_config(**ALL), make_config()
    assert cfg == plain
    assert cfg.fingerprint == plain.fingerprint
    assert type(cfg).from_json(cfg.to_json()).attn_dropout == 0.3
