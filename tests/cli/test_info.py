"""`hooklens info` against transformers' own counts."""

from pathlib import Path

from transformers import AutoModelForCausalLM

import hooklens as hl
from hooklens.display.numbers import format_bytes
from tests.cli.conftest import Run


def test_numbers_are_the_models(run: Run, checkpoint: Path) -> None:
    result = run("info", checkpoint)
    assert result.exit_code == 0, result.output
    n_parameters = AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    assert f"{n_parameters:,} ({format_bytes(4 * n_parameters)} in float32)" in result.stdout
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    one_token = model.prefill("Mary", prepend_bos=False)
    assert len(one_token) == 1
    assert f"{format_bytes(one_token.nbytes)} per token" in result.stdout


def test_every_kind_of_hook_point_is_listed(run: Run, checkpoint: Path) -> None:
    lines = run("info", checkpoint).stdout.splitlines()
    model = hl.HookedCausalLM.from_pretrained(checkpoint)
    for name, on_request in model.hook_table()[["name", "on_request"]].itertuples(index=False):
        kind = name.replace("blocks.3.", "blocks.{i}.")
        if not name.startswith("blocks.") or kind != name:
            (line,) = [line for line in lines if line.split()[:1] == [kind]]
            assert (line.split()[1] == "*") == on_request


def test_configuration_is_listed(run: Run, checkpoint: Path) -> None:
    lines = [line.split() for line in run("info", checkpoint).stdout.splitlines()]
    assert ["n_kv_heads", "2"] in lines
    assert ["gated_mlp", "True"] in lines
