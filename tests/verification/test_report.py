"""What a report says, and when it has passed."""

from typing import Any

import pytest

from hooklens.verification import CheckResult, VerificationReport
from tests.verification.networks import NeverFires, build, verify_points


def test_a_report_reads_as_a_table() -> None:
    model = build()
    model.block_list()[0].attn.hook_z = NeverFires()
    report = verify_points(model, layers=[0], n_tokens=8)
    text, table = str(report), report.to_dataframe()

    assert "FAILED" in text.splitlines()[0]
    assert "fires once" in text
    assert "FAILED  fires once, blocks.0.attn.hook_z: 0, expected == 1" in text
    assert len(table) == len(report.results)
    assert list(table[~table["passed"]]["subject"]) == [failure.subject for failure in report.failures]
    assert "<table " in report._repr_html_()
    assert "VerificationReport" in repr(report)


@pytest.mark.parametrize(
    ("relation", "measured", "passed"),
    [("<=", 1.0, True), ("<=", 1.1, False), (">", 1.0, False), (">", 1.1, True), ("==", 1.0, True), ("==", 2.0, False)],
)
def test_a_result_is_held_against_its_bound(relation: Any, measured: float, passed: bool) -> None:
    result = CheckResult(check="c", subject="s", measured=measured, bound=1.0, relation=relation)

    assert result.passed is passed
    assert not CheckResult(check="c", subject="s", measured=float("nan"), bound=1.0, relation=relation).passed


def test_a_report_of_nothing_has_not_passed() -> None:
    report = VerificationReport("a model", [])

    assert not report.passed
    assert "nothing was checked" in str(report)
