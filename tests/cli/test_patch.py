"""`hooklens patch` against a sweep of the same prompts."""

from pathlib import Path

import pandas as pd
import pytest

import hooklens as hl
from hooklens import patching
from tests.cli.conftest import Run

CLEAN, CORRUPTED = "Mary gave a drink to", "John gave a drink to"


def test_table_and_image(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    options = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "John", "--wrong", "Mary", "--site", "z")
    result = run("patch", checkpoint, *options, "--out", out)
    assert result.exit_code == 0, result.output
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    expected = patching.sweep(model, CLEAN, CORRUPTED, "z", patching.LogitDiff("John", "Mary"), progress=False)
    table = pd.read_csv(out)
    assert table.value.tolist() == pytest.approx(expected.to_dataframe().value.tolist(), abs=1e-5)
    assert f"clean {expected.clean:.4f}, corrupted {expected.corrupted:.4f}" in result.stdout
    assert str(expected.top(1).site[0]) in result.stdout
    assert out.with_suffix(".png").stat().st_size > 0


def test_noise_without_a_wrong_answer(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    options = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "John", "--noise", "--out", out)
    assert run("patch", checkpoint, *options).exit_code == 0
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    expected = patching.sweep(
        model, CLEAN, CORRUPTED, "resid_pre", patching.LogProb("John"), direction="noise", progress=False
    )
    assert pd.read_csv(out).value.tolist() == pytest.approx(expected.to_dataframe().value.tolist(), abs=1e-5)


def test_prompts_that_do_not_align_are_an_error(run: Run, checkpoint: Path) -> None:
    result = run("patch", checkpoint, "--clean", CLEAN, "--corrupted", "John", "--answer", "John")
    assert result.exit_code == 2
    assert "positions can be compared only if they have as many" in result.output


def test_a_place_that_takes_no_results_is_refused_before_the_work(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error of the system after the sweep, whose results were lost."""
    monkeypatch.setattr("hooklens.cli.patch.sweep", None)
    options = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "John")
    (tmp_path / "taken.png").mkdir()
    for out, message in {
        tmp_path / "no" / "table.csv": "does not exist",
        tmp_path: "is no regular file",
        Path("/"): "give the name of a file",
        tmp_path / "table.png": "the name of the image; give the table's",
        tmp_path / "taken.csv": "is no regular file",
    }.items():
        result = run("patch", checkpoint, *options, "--out", out)
        assert result.exit_code == 2
        assert message in result.stderr
