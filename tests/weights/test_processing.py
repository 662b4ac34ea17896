"""Every step on every wiring: equal log-probabilities, untouched inputs, stored layout, and refusals."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.config import RotaryPositions
from hooklens.errors import CheckpointError, TransformError
from hooklens.weights.layout import stored_view
from hooklens.weights.processing import check_transforms_match, process_weights
from hooklens.weights.shapes import check_state
from hooklens.weights.steps import Processed
from tests.weights.reference_network import (
    CONFIGS,
    STEPS,
    log_probs,
    make_config,
    random_state,
    random_tokens,
    run_reference,
)

# Which (config, step) pairs hold, written by hand: the code's own refusals must agree with this table.
REFUSED = {
    "center_writing_weights": {
        "rms, gated, grouped",
        "rms, unit offset, norms after, caps, tied",
        "norms after only",
        "no norm in the blocks",
        "no norms",
        "no final norm",
        "layers that lack parts",
        "layers with other norms",
    },
    "center_unembed": {"rms, unit offset, norms after, caps, tied"},
    "refactor_factored_attn_matrices": {
        "parallel, two norms, grouped",
        "parallel, shared norm, multi-query, tied",
        "rms, gated, grouped",
        "rms, unit offset, norms after, caps, tied",
        "gated with biases",
        "layers with other norms",
    },
}
# Steps that find nothing to do.
IDLE = {
    ("fold_ln", "no norms"),
    ("fold_value_biases", "MLPs alone"),
    ("refactor_factored_attn_matrices", "MLPs alone"),
}
ALLOWED = [(step, name) for step, name in product(STEPS, CONFIGS) if name not in REFUSED.get(step, ())]
FORBIDDEN = [(step, name) for step, name in product(STEPS, CONFIGS) if name in REFUSED.get(step, ())]
# Rounding of some hundred operations, with room for the conditioning of two random layers, whose sums are longer or
# shorter by the processor's kernels: in float32 40 roundings of the largest log-probability, of which 9 were seen.
# Without norms log-probabilities are in the hundreds.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}


def _snapshot(state):
    return {name: (tensor.clone(), tensor.stride(), tensor.data_ptr()) for name, tensor in state.items()}


def _assert_unchanged(state, snapshot):
    assert list(state) == list(snapshot)
    for name, (values, strides, address) in snapshot.items():
        assert torch.equal(state[name], values), name
        assert (state[name].stride(), state[name].data_ptr()) == (strides, address), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("step", "name"), ALLOWED)
def test_a_step_keeps_log_probabilities_and_its_input(step, name, dtype):
    cfg = CONFIGS[name]
    state = random_state(cfg, dtype=dtype)
    tokens, before = random_tokens(cfg), _snapshot(state)
    processed = process_weights(state, cfg, **{step: True})
    _assert_unchanged(state, before)
    check_state(processed.state, processed.cfg)
    assert processed.steps[-1] == step
    assert {tensor.dtype for tensor in processed.state.values()} == {dtype}
    expected = log_probs(state, cfg, tokens)
    torch.testing.assert_close(
        log_probs(processed.state, processed.cfg, tokens), expected, rtol=0, atol=TOLERANCE[dtype] * _size(expected)
    )


def _size(values):
    return max(1.0, float(values.abs().max()) / 100)


@pytest.mark.parametrize(("step", "name"), ALLOWED)
def test_touched_tensors_are_new_and_laid_out_and_untouched_ones_are_shared(step, name):
    cfg = CONFIGS[name]
    state = random_state(cfg)
    processed = process_weights(state, cfg, **{step: True})
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    changed = 0
    for weight, tensor in processed.state.items():
        if weight in state and torch.equal(tensor, state[weight]):
            continue
        changed += 1
        assert tensor.untyped_storage().data_ptr() not in storages, weight
        declared = processed.cfg.description.weights[weight]
        stored = stored_view(tensor, declared.stored, declared.axes)
        assert stored.is_contiguous(), weight
        assert stored.data_ptr() == tensor.data_ptr(), weight
        assert not tensor.requires_grad
    if step != "fold_value_biases" or cfg.qkv_bias:
        assert bool(changed) != ((step, name) in IDLE)
    embedding = processed.state["embed.W_E"]
    assert (embedding is state["embed.W_E"]) == (step != "center_writing_weights")


@pytest.mark.parametrize(("step", "name"), FORBIDDEN)
def test_a_step_that_cannot_hold_is_refused(step, name):
    cfg = CONFIGS[name]
    with pytest.raises(TransformError, match=rf"leave these steps out:\n- {step}: "):
        process_weights(random_state(cfg), cfg, **{step: True})


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_that_preserve_logits_preserve_them(name):
    cfg = CONFIGS[name]
    state, tokens = random_state(cfg), random_tokens(cfg)
    allowed = {step: True for step, config in ALLOWED if config == name and step != "center_unembed"}
    processed = process_weights(state, cfg, **allowed)
    torch.testing.assert_close(
        run_reference(processed.state, processed.cfg, tokens), run_reference(state, cfg, tokens), rtol=0, atol=1e-9
    )


@given(name=st.sampled_from(sorted(CONFIGS)), chosen=st.sets(st.sampled_from(STEPS)), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_any_allowed_choice_of_steps_keeps_log_probabilities(name, chosen, seed):
    cfg = CONFIGS[name]
    state, tokens = random_state(cfg, seed=seed), random_tokens(cfg, seed=seed)
    flags = {step: True for step in STEPS if step in chosen and (step, name) in ALLOWED}
    processed = process_weights(state, cfg, **flags)
    expected = set(flags) | ({"fold_value_biases"} if "refactor_factored_attn_matrices" in flags else set())
    assert processed.steps == tuple(step for step in STEPS if step in expected)
    torch.testing.assert_close(
        log_probs(processed.state, processed.cfg, tokens), log_probs(state, cfg, tokens), rtol=0, atol=1e-9
    )


def test_no_step_gives_the_same_tensors():
    cfg = CONFIGS["sequential, tied, learned"]
    state = random_state(cfg)
    processed = process_weights(state, cfg)
    assert processed.steps == ()
    assert processed.cfg == cfg
    tied = processed.state.pop("unembed.W_U")
    assert tied.untyped_storage().data_ptr() == state["embed.W_E"].untyped_storage().data_ptr()
    assert all(processed.state[name] is state[name] for name in processed.state)


def test_refactoring_twice_moves_signs_only():
    cfg = CONFIGS["sequential, alibi"]
    once = process_weights(random_state(cfg), cfg, refactor_factored_attn_matrices=True)
    twice = process_weights(once.state, once.cfg, refactor_factored_attn_matrices=True)
    for name, tensor in once.state.items():
        torch.testing.assert_close(twice.state[name].abs(), tensor.abs(), rtol=0, atol=1e-9)


def test_processing_twice_changes_nothing_more():
    cfg = CONFIGS["sequential, alibi"]
    flags = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True)
    once = process_weights(random_state(cfg), cfg, **flags)
    twice = process_weights(once.state, once.cfg, **flags)
    assert twice.cfg == once.cfg
    for name, tensor in once.state.items():
        torch.testing.assert_close(twice.state[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_rounded_once(dtype):
    """W_U is touched by fold_ln and center_unembed: computing from float32 all the way gives the same bits."""
    cfg = CONFIGS["sequential, alibi"]
    flags = {"fold_ln": True, "center_unembed": True, "center_writing_weights": True, "fold_value_biases": True}
    state = random_state(cfg, dtype=dtype)
    half = process_weights(state, cfg, **flags)
    full = process_weights({name: tensor.float() for name, tensor in state.items()}, cfg, **flags)
    for name, tensor in half.state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, full.state[name].to(dtype)), name


def test_a_new_bias_has_the_dtype_of_its_weight():
    cfg = CONFIGS["sequential, no biases in the maps"]
    state = random_state(cfg, dtype=torch.bfloat16)
    state |= {name: tensor.float() for name, tensor in state.items() if ".mlp." in name}
    processed = process_weights(state, cfg, fold_ln=True)
    assert processed.state["blocks.0.attn.b_Q"].dtype == torch.bfloat16
    assert processed.state["blocks.0.mlp.b_in"].dtype == torch.float32
    assert processed.state["blocks.0.ln1.w"].dtype == torch.bfloat16


def test_parameters_that_need_gradients_are_processed_as_plain_values():
    cfg = CONFIGS["gated with biases"]
    state = {name: torch.nn.Parameter(tensor) for name, tensor in random_state(cfg).items()}
    processed = process_weights(state, cfg, fold_ln=True)
    assert not processed.state["blocks.0.attn.W_Q"].requires_grad


def test_a_tied_unembedding_missing_from_the_state_is_read_from_the_embedding():
    cfg = CONFIGS["sequential, tied, learned"]
    state = random_state(cfg)
    without = {name: tensor for name, tensor in state.items() if name != "unembed.W_U"}
    a, b = (process_weights(given, cfg, fold_ln=True, center_unembed=True) for given in (state, without))
    assert torch.equal(a.state["unembed.W_U"], b.state["unembed.W_U"])
    assert not a.cfg.tied_unembed


def test_all_refusals_come_in_one_error_before_the_state_is_read():
    cfg = CONFIGS["rms, unit offset, norms after, caps, tied"].replace(positions=RotaryPositions(dim=2), n_kv_heads=2)
    with pytest.raises(TransformError) as caught:
        process_weights({}, cfg, **dict.fromkeys(STEPS, True))
    text = str(caught.value)
    assert "center_writing_weights: cfg.norm.kind is 'rms', which does not subtract the mean" in text
    assert "center_writing_weights: cfg.norm_after is True: norms, not weights, write to the stream" in text
    assert "center_unembed: cfg.logits_softcap is 3.0, so adding a number to all logits changes the softmax" in text
    assert "refactor_factored_attn_matrices: rotary positions" in text
    assert "refactor_factored_attn_matrices: query-key norm" in text
    assert "4 query heads share the W_K and W_V of 2 key-value heads" in text
    assert "fold_ln" not in text


def test_a_state_that_does_not_fit_is_refused():
    with pytest.raises(CheckpointError, match="does not fit its config"):
        process_weights({}, make_config(), fold_ln=True)


def test_matching_records_pass():
    check_transforms_match((), ())
    check_transforms_match(("fold_ln", "center_unembed"), ("center_unembed", "fold_ln", "fold_ln"))
    check_transforms_match(("fold_value_biases", "center_writing_weights"), STEPS[1:2] + STEPS[3:4])


def test_records_with_different_steps_are_refused_by_name():
    with pytest.raises(
        TransformError,
        match=r"fold_ln \+ center_unembed against no processing \(only one of the two has center_unembed, fold_ln\)",
    ):
        check_transforms_match(("fold_ln", "center_unembed"), ())


@pytest.mark.parametrize(
    "pair",
    [
        ("fold_ln", "fold_value_biases"),
        ("fold_ln", "refactor_factored_attn_matrices"),
        ("center_writing_weights", "refactor_factored_attn_matrices"),
    ],
)
def test_records_in_an_order_that_matters_are_refused(pair):
    with pytest.raises(TransformError, match="the same steps in another order"):
        check_transforms_match(pair, pair[::-1])


@pytest.mark.parametrize("pair", list(product(STEPS, STEPS)), ids="-".join)
def test_records_are_told_apart_by_order_exactly_where_the_weights_are(pair):
    """Two steps in both orders: the record check accepts the pair if and only if the weights agree."""
    first, second = pair
    cfg = CONFIGS["sequential, alibi"]
    state = random_state(cfg)

    def take(steps):
        processed, record = Processed(state, cfg, ()), ()
        for step in steps:
            processed = process_weights(processed.state, processed.cfg, **{step: True})
            record += processed.steps
        return processed, record

    (a, record_a), (b, record_b) = take((first, second)), take((second, first))
    equal = all(torch.allclose(a.state[name], b.state[name], rtol=0, atol=1e-8) for name in a.state)
    if equal:
        check_transforms_match(record_a, record_b)
    else:
        with pytest.raises(TransformError, match="another order"):
            check_transforms_match(record_a, record_b)
