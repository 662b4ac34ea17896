"""Gradients that are not those of an edit are named."""

import pytest
import torch

from hooklens.verification.probe import make_probe
from tests.model.networks import make_model
from tests.verification.networks import Detaches, build, verify_points


def test_a_wrong_gradient_is_named() -> None:
    model = build()
    model.block_list()[0].hook_attn_out = Detaches()

    report = verify_points(model, gradients=True, layers=[0])

    assert "gradient is the derivative of an edit" in {failure.check for failure in report.failures}


def test_gradients_in_single_precision_are_held_against_a_leaf() -> None:
    """Differences drown in rounding there; what large models get, which are not copied to float64."""
    from hooklens.verification.gradients import check_gradients

    model = build("gated-shared-norm")
    with torch.no_grad():
        assert all(result.passed for result in check_gradients(make_probe(model)))
        model.block_list()[0].hook_attn_out = Detaches()
        results = check_gradients(make_probe(model))

    assert not all(result.passed for result in results)


@pytest.mark.long
def test_gradients_next_to_nothing_are_not_held_against_their_own_size() -> None:
    """A correct gradient of 1e-18 failed: its rounding is that of the loss, not its own."""
    report = verify_points(make_model("alibi, grouped"), gradients=True)
    assert report.failures == ()
