"""`hooklens plan`: the numbers of `hooklens.plan`, and its exit code."""

from pathlib import Path

import pytest
import torch

import hooklens as hl
from hooklens.display import format_bytes
from tests.cli.conftest import Run

PROMPT = "When Mary and John went to the store"


def test_numbers_are_the_plans(run: Run, checkpoint: Path) -> None:
    options = ["--names", "resid_post", "--names", "z", "--batch", "3", "--logits-at", "-1", "--pos-slice", "-1"]
    result = run("plan", checkpoint, PROMPT, *options, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    plan = hl.plan(
        model, [PROMPT] * 3, names_filter=["resid_post", "z"], logits_at=-1, pos_slice=-1, dtype=torch.bfloat16,
        grad=False,
    )  # fmt: skip
    assert str(plan).splitlines()[:3] == result.stdout.splitlines()[:3]
    assert f"captured             {format_bytes(plan.captured)}" in result.stdout


def test_a_backward_pass(run: Run, checkpoint: Path) -> None:
    lines = run("plan", checkpoint, PROMPT, "--no-capture", "--backward").stdout
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    plan = hl.plan(model, PROMPT, capture=False, backward=True)
    assert f"peak of the backward  {format_bytes(plan.peak)}" in lines


def test_what_does_not_fit_is_exit_code_1(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooklens.causal_lm.memory.plan.free_bytes", lambda device: 1000)
    result = run("plan", checkpoint, PROMPT, "--batch", "2")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "one row at a time spares about" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-capture", "--names", "z"], "--no-capture keeps nothing"),
        (["--dtype", "float7"], "--dtype is 'float7'"),
        (["--names", "nothing_such"], "nothing_such"),
    ],
)
def test_refusals(run: Run, checkpoint: Path, options: list[str], message: str) -> None:
    result = run("plan", checkpoint, PROMPT, *options)
    assert result.exit_code != 0
    assert message in f"{result.output}{result.exception}"
