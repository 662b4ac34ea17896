"""Tests of hooklens.model.initialization: how widely fresh weights spread, and what a seed decides."""

import math
from typing import get_args

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig, LearnedPositions, NoPositions, NormConfig, PartConfig
from hooklens.config import InitScheme
from hooklens.errors import ConfigError, InputError
from hooklens.model.decoder import Decoder
from hooklens.model.initialization import count_branches, fans
from tests.annotations import unchecked

D, V, F, H, K, DH, L, P = 48, 101, 80, 6, 2, 10, 3, 37
CFG = HookedConfig(
    d_model=D, n_layers=L, n_heads=H, n_kv_heads=K, d_head=DH, d_mlp=F, d_vocab=V, n_ctx=P, gated_mlp=True,
    positions=LearnedPositions(), unembed_bias=True, init_std=0.3, qk_norm=NormConfig(kind="rms", eps=1e-6, bias=False),
)  # fmt: skip
BRANCHES = 2 * L
READS = {"W_E": V, "W_pos": P, "W_Q": D, "W_K": D, "W_V": D, "W_O": DH, "W_in": D, "W_gate": D, "W_out": F, "W_U": D}
GIVES = {
    "W_E": D, "W_pos": D, "W_Q": H * DH, "W_K": K * DH, "W_V": K * DH, "W_O": H * D, "W_in": F, "W_gate": F, "W_out": D,
    "W_U": V,
}  # fmt: skip


def expect(scheme: str, word: str) -> float:
    """The standard deviation, from the published formula."""
    reads, gives, small = READS[word], GIVES[word], math.sqrt(2 / (5 * D))
    if scheme.startswith("xavier"):
        return math.sqrt(2 / (reads + gives))
    if scheme.startswith("kaiming"):
        return math.sqrt(2 / reads)
    writes = word in ("W_O", "W_out")
    return {
        "gpt2": 0.3 / math.sqrt(BRANCHES) if writes else 0.3,
        "muP": {"W_E": 1.0, "W_pos": 1.0, "W_U": 1 / D}.get(word, reads**-0.5),
        "small": small,
        "wang": 2 / BRANCHES / math.sqrt(D) if writes else small,
    }[scheme]


@pytest.mark.parametrize("scheme", get_args(InitScheme))
def test_weights_spread_as_the_formula_says(scheme):
    decoder = Decoder(CFG)
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    decoder.initialize(seed=5, scheme=scheme)
    for name in CFG.description.weights:
        path, _, word = name.rpartition(".")
        weight = getattr(decoder.get_submodule(path), word).detach().double()
        if word.startswith("b"):
            assert (weight == 0).all(), name
        elif word == "w":
            assert (weight == 1).all(), name
        else:
            n, std = weight.numel(), expect(scheme, word)
            # Five standard errors: of the mean, and of the standard deviation (kurtosis 3 or, uniform, 9 / 5).
            kurtosis = 9 / 5 if scheme.endswith("uniform") else 3
            assert abs(weight.mean()) < 5 * std / math.sqrt(n), name
            assert abs(weight.pow(2).mean().sqrt() / std - 1) < 5 * math.sqrt((kurtosis - 1) / 4 / n), name
            if scheme.endswith("uniform"):
                assert weight.abs().max() <= math.sqrt(3) * std * (1 + 1e-6), name
            else:
                assert weight.abs().max() > 2 * std, name


def test_branches_are_what_writes_to_the_stream():
    """A network without MLPs has half of the branches, so what they write is twice as wide."""
    assert count_branches(CFG) == BRANCHES
    attention = PartConfig(kind="attention")
    some = CFG.replace(attn=(attention, None, attention), mlp=(None, PartConfig(kind="mlp"), None))
    assert count_branches(some) == 3
    assert count_branches(CFG.replace(attn=None, attn_only=True)) == 0
    wide = HookedConfig(
        d_model=400, n_layers=2, n_heads=4, d_vocab=5, n_ctx=4, attn_only=True, norm=None, positions=NoPositions()
    )
    decoder = Decoder(wide)
    decoder.initialize(seed=1, scheme="wang")
    # 160,000 entries: five standard errors are 0.9 %.
    assert decoder.blocks[1].attn.W_O.std().item() == pytest.approx(2 / 2 / math.sqrt(400), rel=0.009)


def test_a_tied_unembedding_stays_the_embedding():
    model = HookedCausalLM(CFG.replace(tied_unembed=True, unembed_bias=False))
    model.initialize(seed=1, scheme="muP")
    assert torch.equal(model.unembed.W_U, model.embed.W_E.T)
    assert model.embed.W_E.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * V * D))


@pytest.mark.parametrize("scheme", get_args(InitScheme))
def test_a_seed_draws_the_same_and_leaves_the_rest_alone(scheme):
    def draw(dtype=torch.float32):
        model = Decoder(CFG).to(dtype)
        before = torch.random.get_rng_state()
        model.initialize(seed=7, scheme=scheme)
        assert torch.equal(torch.random.get_rng_state(), before)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    expected = draw()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + threads % 2 * 3)
        assert torch.equal(draw(), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draw(torch.float64), expected.double())
    assert torch.equal(draw(torch.bfloat16), expected.bfloat16())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(draw(torch.float32), expected)
    finally:
        torch.set_default_dtype(before)


def test_the_config_names_the_scheme_of_a_fresh_model():
    cfg = CFG.replace(init_scheme="wang")
    torch.manual_seed(3)
    fresh = HookedCausalLM(cfg)
    torch.manual_seed(3)
    named = HookedCausalLM(CFG)
    torch.manual_seed(3)
    named.initialize(scheme="wang")
    assert torch.equal(fresh.W_O, named.W_O)
    assert HookedConfig.from_json(cfg.to_json()).init_scheme == "wang"
    # What it was drawn by decides nothing of what a network computes.
    assert (cfg, cfg.fingerprint) == (CFG, CFG.fingerprint)


def test_unknown_schemes_are_refused():
    with (
        unchecked(),
        pytest.raises(ConfigError, match="config: init_scheme is 'he'; expected one of 'gpt2', "),
    ):
        CFG.replace(init_scheme="he")
    with unchecked(), pytest.raises(InputError, match=r"scheme is 'he', expected 'gpt2', .* or 'wang', or None"):
        Decoder(CFG).initialize(scheme="he")


def test_fans_of_maps_that_stand_beside_each_other():
    assert fans(("expert", "d_model", "d_mlp"), (8, 4, 16)) == (4, 16)
    assert fans(("head", "d_model", "d_head"), (3, 4, 5)) == (4, 15)
    assert fans(("head",), (3,)) == (1, 3)
