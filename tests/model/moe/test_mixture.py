"""Tests of hooklens.model.moe.mixture: the whole layer against one token after another, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import MoEConfig
from tests.model.moe.layers import MIXTURES, compute_by_hand, make_layer, random_stream


@pytest.mark.parametrize("name", MIXTURES)
def test_layer_is_the_sum_of_its_experts_token_by_token(name):
    layer, x = make_layer(MIXTURES[name]), random_stream(2, 7)
    torch.testing.assert_close(layer(x), compute_by_hand(layer, MIXTURES[name], x), rtol=1e-12, atol=1e-12)


@st.composite
def _mixtures(draw) -> dict[str, object]:
    router = draw(st.sampled_from(["softmax", "sigmoid", "sigmoid_input", "sparsemixer"]))
    n_groups, size = draw(st.sampled_from([1, 2, 3])), draw(st.integers(2, 4))
    plain = router in ("softmax", "sigmoid")
    grouped = plain and draw(st.booleans())
    kept = draw(st.integers(1, n_groups)) if grouped else n_groups
    k = 2 if router == "sparsemixer" else draw(st.integers(1, kept * size))
    d_shared = draw(st.none() | st.integers(1, 4))
    return {
        "n_experts": n_groups * size,
        "experts_per_token": k,
        "d_expert": draw(st.integers(1, 5)),
        "router": router,
        "gate_norm": draw(st.sampled_from([None, 1.0, 2.0])) if plain else None,
        "gate_scale": draw(st.sampled_from([None, 2.5])),
        "choice_bias": plain and draw(st.booleans()),
        "n_groups": n_groups if grouped else None,
        "groups_per_token": kept if grouped else None,
        "group_top": draw(st.integers(1, size)) if grouped else 1,
        "sparsemixer_eps": draw(st.sampled_from([None, 0.3])) if router == "sparsemixer" else None,
        "router_bias": draw(st.booleans()),
        "router_float32": draw(st.booleans()),
        "expert_bias": router != "sigmoid_input" and draw(st.booleans()),
        "act_fn": draw(st.sampled_from([None, "relu", "gelu", "clamped_swiglu"])),
        "d_shared": d_shared,
        "shared_gate": d_shared is not None and draw(st.booleans()),
    }


@settings(max_examples=60)
@given(mixture=_mixtures(), seed=st.integers(0, 1000))
def test_any_mixture_is_the_sum_of_its_experts(mixture, seed):
    mixture = MoEConfig(**mixture)
    layer, x = make_layer(mixture, seed=seed), random_stream(1, 4, seed=seed)
    torch.testing.assert_close(layer(x), compute_by_hand(layer, mixture, x), rtol=1e-11, atol=1e-11)
    assert MoEConfig(**mixture.options) == mixture
