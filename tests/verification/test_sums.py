"""Sums, products and positions that do not hold are named."""

import pytest
import torch
from torch import Tensor

from hooklens.hooks import Call
from hooklens.model.attention import Attention
from hooklens.model.positions import TokenPlan
from tests.verification.networks import build, verify_points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_positions_of_padded_rows_are_named(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_columns(plan: TokenPlan) -> Tensor:
        return torch.arange(plan.n_new)[None]

    monkeypatch.setattr(TokenPlan, "positions", property(count_columns))

    report = verify_points(build("learned").to(dtype))

    assert {failure.subject for failure in report.failures} == {"left-padded"}
    assert "logits of real tokens depend on left padding" in str(report)


def test_a_pattern_that_z_was_not_computed_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_pattern = Attention._watch_pattern

    def watch_scaled(attention: Attention, q: Tensor, k: Tensor, plan: TokenPlan, call: Call) -> tuple[Tensor, bool]:
        return watch_pattern(attention, 2 * q, k, plan, call)

    monkeypatch.setattr(Attention, "_watch_pattern", watch_scaled)

    checks = {failure.check for failure in verify_points(build()).failures}

    assert {"z is pattern times values", "writing back an equal copy"} <= checks
