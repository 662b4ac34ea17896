"""Constants of a config go into the weights, and norms that do nothing go; neither changes logits."""

from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig, LearnedPositions, NormConfig, RotaryPositions, ShortformerPositions
from hooklens.weights.constants import bake_constants, change_norms, drop_trivial_norms, is_trivial

RMS = NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=True)
CHANGES: dict[str, dict[str, Any]] = {
    "scaled embedding, norms with an offset": {
        "positions": RotaryPositions(dim=8), "embed_scale": 4.0, "norm": RMS, "qk_norm": RMS, "tied_unembed": True,
    },
    "norms with an offset": {"final_norm": RMS},
    "rows before the first position": {"positions": LearnedPositions(offset=2)},
    "the same for queries and keys": {"positions": ShortformerPositions(offset=2)},
}  # fmt: skip
IDS = torch.arange(1, 11)[None]


def _random(**changes: Any) -> HookedCausalLM:
    fields = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_vocab": 31, "n_ctx": 12, "positions": LearnedPositions()}
    model = HookedCausalLM(HookedConfig(**{**fields, **changes})).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_baked_models_compute_the_same(name: str) -> None:
    model = _random(**CHANGES[name])
    before = {own: weight.clone() for own, weight in model.named_weights().items()}
    state, cfg = bake_constants(model.named_weights(), model.cfg)
    baked = HookedCausalLM.from_state_dict(state, cfg)
    with torch.no_grad():
        # The factor of the embedding is rounded to the dtype of the weights, twice.
        torch.testing.assert_close(baked(IDS), model(IDS), rtol=1e-9, atol=1e-9)
    assert cfg.embed_scale is None
    assert not any(norm.unit_offset for norm in cfg.description.norms.values())
    assert all(torch.equal(weight, before[own]) for own, weight in model.named_weights().items())
    if "rows" in name:
        assert baked.W_pos.shape == (12, 16)


def test_the_factor_and_the_one_are_in_the_weights() -> None:
    model = _random(**CHANGES["scaled embedding, norms with an offset"])
    state, _ = bake_constants(model.named_weights(), model.cfg)
    assert torch.equal(state["embed.W_E"], 4 * model.W_E)
    assert torch.equal(state["unembed.W_U"], model.W_U), "the factor is the embedding's alone"
    assert torch.equal(state["blocks.1.ln2.w"], 1 + model.named_weights()["blocks.1.ln2.w"])


def test_without_constants_all_stays() -> None:
    model = _random()
    weights = dict(model.named_weights())
    state, cfg = bake_constants(weights, model.cfg)
    assert cfg is model.cfg
    assert all(state[name] is weights[name] for name in weights)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_norms_that_folding_left_trivial_go(offset: bool, branch: bool) -> None:
    """Norms behind the branches have weights of their own after folding, and then the blocks' norms keep theirs."""
    norm = NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=offset)
    model = _random(norm=norm, norm_after=branch, positions=RotaryPositions(dim=8)).process_weights(fold_ln=True)
    state, cfg = drop_trivial_norms(model.named_weights(), model.cfg)
    gone = set(model.named_weights()) - set(state)
    expected = {"ln_final.w"} if branch else {"ln_final.w", *(f"blocks.{i}.ln{n}.w" for i in (0, 1) for n in (1, 2))}
    assert gone == expected
    with torch.no_grad():
        plain = HookedCausalLM.from_state_dict(state, cfg)
        torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def test_a_norm_that_does_something_stays() -> None:
    model = _random().process_weights(fold_ln=True)
    state = dict(model.named_weights())
    state["blocks.1.ln2.b"] = state["blocks.1.ln2.b"] + 1
    kept, cfg = drop_trivial_norms(state, model.cfg)
    assert cfg.norm == model.cfg.norm
    assert "blocks.0.ln1.w" in kept
    assert "ln_final.w" not in kept


def test_what_a_norms_weight_does() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert is_trivial("ln_final.w", ones)
    assert is_trivial("ln_final.b", zeros)
    assert is_trivial("ln_final.w", zeros, unit_offset=True)
    assert not is_trivial("ln_final.w", zeros)
    assert not is_trivial("ln_final.w", ones, unit_offset=True)
    assert not is_trivial("ln_final.b", ones, unit_offset=True)
    assert is_trivial("ln_final.b", None)


def test_norms_of_each_layer_change_and_absent_ones_stay_absent() -> None:
    assert change_norms((RMS, None), unit_offset=False) == (NormConfig(kind="rms", eps=1e-5, bias=False), None)
    assert change_norms(None, weight=False) is None
