"""`hooklens convert`, read back with transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hooklens.display.numbers import format_bytes
from tests.cli.conftest import Run


def test_converted_checkpoint_is_bit_equal_in_transformers(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", checkpoint, tmp_path / "out", "--max-shard-size", "1MB")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = "Mary gave a drink to John ."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(checkpoint)(text)


def test_dtype_is_changed_on_request(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16")
    n_parameters = AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    written = sum(path.stat().st_size for path in (tmp_path / "half").glob("*.safetensors"))
    assert f"{n_parameters:,} parameters in {format_bytes(written)} of safetensors files" in result.stdout
    # Two bytes each, and the file's header.
    assert 2 * n_parameters < written < 2.05 * n_parameters
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_checkpoint_in_the_way_is_kept(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = run("convert", checkpoint, tmp_path)
    assert result.exit_code == 2
    assert "already holds a checkpoint; choose another folder, or pass --overwrite" in result.stderr
    assert (tmp_path / "config.json").read_text() == "{}"
    assert run("convert", checkpoint, tmp_path, "--overwrite").exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0


@pytest.mark.parametrize("size", ["big", "5 GiB", "-1", ""])
def test_shard_size_is_checked_before_anything_is_loaded(run: Run, tmp_path: Path, size: str) -> None:
    result = run("convert", tmp_path / "nowhere", tmp_path / "out", f"--max-shard-size={size}")
    assert result.exit_code == 2
    assert f"--max-shard-size is {size!r}; expected a size such as 500MB" in result.stderr
