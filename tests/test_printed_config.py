"""The printed form of a configuration: the call that makes an equal one."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hooklens.config
from hooklens.config import (
    HookedConfig,
    LearnedPositions,
    MoEConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    RotaryPositions,
    RotaryScaling,
)
from hooklens.config.printed import GROUPS, print_value
from tests.model.networks import ALL_CONFIGS, make_config

CONFIGS = {
    **ALL_CONFIGS,
    "experts in every other layer": make_config(
        n_layers=6, mlp=(PartConfig(kind="mlp"), MoEConfig(n_experts=4, experts_per_token=2, d_expert=8)) * 3
    ),
    "no MLP by layers": make_config(mlp=(None, None)),
    "scaled rotary": make_config(
        positions=RotaryPositions(dim=6, base=5e5, scaling=RotaryScaling(kind="linear", factor=2.0)), wiring="parallel"
    ),
    "norm of the activation": make_config(act_fn="solu_ln"),
    "clamped": make_config(act_fn="clamped_swiglu", gated_mlp=True, swiglu_limit=5.0),
    "biases apart": make_config(q_bias=False, mlp_out_bias=False),
    "deep": make_config(n_layers=48, windows=(16, 16, None) * 16, norm_after=(True,) * 5 + (False,) * 43),
    "trained anew": make_config(resid_dropout=0.1, init_scheme="wang", attention_backend="explicit"),
    "no layers": make_config(n_layers=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_printed_call_makes_an_equal_config(name):
    cfg = CONFIGS[name]
    made = eval(repr(cfg), dict(vars(hooklens.config)))
    assert made == cfg
    # Equality leaves out what does not decide the network.
    assert made.to_dict() == cfg.to_dict()


def test_defaults_are_left_out():
    cfg = HookedConfig(d_model=8, n_layers=1, n_heads=2, d_vocab=5, n_ctx=4, positions=NoPositions())
    assert repr(cfg).splitlines() == [
        "HookedConfig(",
        "    n_layers=1, d_model=8, n_heads=2, n_ctx=4,",
        "    d_vocab=5,",
        "    positions=NoPositions(),",
        ")",
    ]
    assert "d_head=3" in repr(cfg.replace(d_head=3))
    assert "norm=NormConfig(kind='rms', eps=0.1, bias=False)," in repr(
        cfg.replace(norm=NormConfig(kind="rms", eps=0.1, bias=False))
    )


def test_every_field_is_in_one_group():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(spec.name for spec in dataclasses.fields(HookedConfig) if spec.repr)


def test_what_is_too_long_says_so():
    factors = tuple(1.0 + 0.001 * number for number in range(300))
    scaling = RotaryScaling(kind="longrope", factor=2.0, original_n_ctx=8, short_factors=factors, long_factors=factors)
    text = repr(make_config(d_head=600, positions=RotaryPositions(dim=600, scaling=scaling)))
    assert len(text.splitlines()) <= 20
    assert text.endswith(")  # cfg.to_dict() has all")


@given(st.lists(st.sampled_from([None, 16, 32]), min_size=2, max_size=40))
def test_tuples_are_told_by_what_they_repeat(values):
    text = print_value(tuple(values))
    assert eval(text) == tuple(values)
    assert len(text) <= len(repr(tuple(values)))


def test_learned_positions_are_printed_without_their_default():
    assert print_value(LearnedPositions()) == "LearnedPositions()"
    assert print_value(LearnedPositions(offset=2)) == "LearnedPositions(offset=2)"
