"""`hooklens verify`: the report, and exit codes that scripts can rely on."""

import pytest

from hooklens.verification import CheckResult, VerificationReport
from tests.cli.conftest import Run


@pytest.mark.parametrize(("measured", "exit_code", "verdict"), [(0.5, 0, "passed"), (2.0, 1, "FAILED")])
def test_exit_code_says_whether_all_checks_passed(
    run: Run, monkeypatch: pytest.MonkeyPatch, measured: float, exit_code: int, verdict: str
) -> None:
    report = VerificationReport("model", [CheckResult(check="logits", subject="float32", measured=measured, bound=1.0)])
    monkeypatch.setattr("hooklens.cli.verify.verify_model", lambda _: report)
    result = run("verify", "model")
    assert result.exit_code == exit_code
    assert result.stdout == f"{report}\n"
    assert f"model: {verdict}" in result.stdout


def test_checkpoint_is_verified_against_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is handed on: a loaded model has no files to be compared with."""
    given: list[object] = []
    report = VerificationReport("model", [])
    monkeypatch.setattr("hooklens.cli.verify.verify_model", lambda model: (given.append(model), report)[1])
    # A report without results has verified nothing.
    assert run("verify", "bundled:tiny-llama").exit_code == 1
    assert given == ["bundled:tiny-llama"]
