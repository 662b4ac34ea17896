"""Every tensor that is shown is held against what its sources make, in every way of running."""

import pytest
import torch
from torch import Tensor

from hooklens.hooks import Call
from hooklens.model.attention.attention import Attention
from hooklens.model.plan.positions import TokenPlan
from hooklens.verification.comparing.recomputing import EXPLICIT, SHOWN, check_explicit_logits, check_ways
from hooklens.verification.comparing.ways import ways_to_run
from hooklens.verification.probe import make_probe
from hooklens.verification.report import CheckResult
from tests.annotations import unchecked
from tests.verification.networks import CONFIGS, build, verify_points, verify_whole


@pytest.mark.parametrize("name", CONFIGS)
def test_every_point_is_recomputed_in_every_way_of_running(name: str) -> None:
    probe = make_probe(build(name))
    with unchecked(), torch.no_grad():
        results = [result for result in check_ways(probe) if result.check == SHOWN]

    subjects = {result.subject for result in results}
    assert subjects == {f"{point}, {way.label}" for point in (*probe.names, "logits") for way in ways_to_run(probe)}
    assert all(result.passed for result in results), [str(result) for result in results if not result.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_positions_of_padded_rows_are_named(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_columns(plan: TokenPlan) -> Tensor:
        return torch.arange(plan.n_new)[None]

    monkeypatch.setattr(TokenPlan, "positions", property(count_columns))

    report = verify_whole(build("learned").to(dtype))

    failed = {failure.subject for failure in report.failures if failure.check == SHOWN}
    assert "hook_pos_embed, left-padded" in failed
    assert "hook_pos_embed, one batch" not in failed
    assert "left-padded" in {failure.subject for failure in report.failures if failure.check == EXPLICIT}


def test_a_pattern_that_z_was_not_computed_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_pattern = Attention._watch_pattern

    def watch_scaled(
        attention: Attention, q: Tensor, k: Tensor, plan: TokenPlan, call: Call, *, drops: bool
    ) -> tuple[Tensor, bool]:
        return watch_pattern(attention, 2 * q, k, plan, call, drops=drops)

    monkeypatch.setattr(Attention, "_watch_pattern", watch_scaled)

    failures = verify_points(build(), layers=[0]).failures

    assert {"blocks.0.attn.hook_attn_scores, one batch", "blocks.0.attn.hook_z, one batch"} <= {
        failure.subject for failure in failures if failure.check == SHOWN
    }
    assert "writing back an equal copy" in {failure.check for failure in failures}


def check_logits_of(network: str) -> dict[str, CheckResult]:
    probe = make_probe(build(network).double())
    with unchecked(), torch.no_grad():
        return {result.subject: result for result in check_explicit_logits(probe)}


def test_logits_are_held_against_the_whole_computation() -> None:
    results = check_logits_of("windows")
    assert {"one batch", "right-padded", "a row of 40", "positions up to n_ctx=40", "prefill and steps"} <= set(results)
    assert all(result.passed for result in results.values())
    # Rotary angles are float32 in every dtype; without them what is found is float64's rounding.
    assert all(result.measured < 1e-6 and result.bound < 1e-5 for result in results.values())
    exact = check_logits_of("windows-of-19")
    assert all(result.passed and result.measured < 1e-12 and result.bound < 1e-11 for result in exact.values())
