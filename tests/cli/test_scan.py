"""`hooklens scan` against the report."""

import html
from pathlib import Path

import pytest

import hooklens as hl
from hooklens import analysis
from tests.cli.conftest import Run

PROMPT = "Mary gave a drink to"


def test_the_report_and_the_page(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("scan", checkpoint, PROMPT, "--html", page, "--answer", "John", "--wrong", "Mary", "--k", 2)
    assert result.exit_code == 0, result.output
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    expected = analysis.report(model, PROMPT, answer="John", wrong="Mary", k=2)
    first, *rest = result.stdout.splitlines()
    assert first == f">>> import hooklens as hl; model = hl.HookedCausalLM.from_pretrained({str(checkpoint)!r})"
    assert rest[:-1] == str(expected).splitlines()
    assert len(rest) <= 60
    assert "Report on 'Mary gave a drink to'" in html.unescape(page.read_text())


def test_a_page_without_a_place_is_refused_before_the_work(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooklens.cli.scan.HookedCausalLM", None)
    for page, message in ((tmp_path / "no" / "page.html", "does not exist"), (tmp_path, "is no regular file")):
        result = run("scan", checkpoint, PROMPT, "--html", page)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_token_that_is_none_is_an_error(run: Run, checkpoint: Path) -> None:
    result = run("scan", checkpoint, PROMPT, "--answer", "John gave")
    assert result.exit_code == 2
    assert "John gave" in result.stderr
