"""How commands end: a message and an exit code, whatever happens."""

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import Result

from hooklens.cli import app
from tests.cli.conftest import Run


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    names = list_commands()
    assert {"demo", "info", "verify", "convert"} <= set(names)
    for name in names:
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("command", ["info", "verify", "demo"])
def test_error_is_one_message_and_exit_code_2(run: Run, command: str) -> None:
    arguments = ["demo", "--model", "bundled:tiny-lama"] if command == "demo" else [command, "bundled:tiny-lama"]
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("hooklens: no bundled checkpoint is called 'tiny-lama'. Did you mean 'tiny-llama'")
    assert "Traceback" not in result.output
    assert result.stdout == ""


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hooklens.cli.verify.verify_model", fail)


def test_a_bug_is_told_as_one_and_shows_where_it_is_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback of the command line's own library and of everything below it."""
    fail_with(monkeypatch, RuntimeError("a bug\nand a long story"))
    monkeypatch.delenv("HOOKLENS_TRACEBACK", raising=False)
    result = run("verify", "x")
    assert result.exit_code == 70
    assert result.stderr == (
        "hooklens: a fault of HookLens itself, please report it: RuntimeError: a bug (set HOOKLENS_TRACEBACK=1 to see "
        "where)\n"
    )
    monkeypatch.setenv("HOOKLENS_TRACEBACK", "1")
    result = run("verify", "x")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "in fail" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "/some/where"), "/some/where: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("Consistency check failed"), "Consistency check failed"),
        (MemoryError(), "memory does not suffice (out of memory)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "memory does not suffice (CUDA out of memory.)"),
    ],
)
def test_what_the_system_refuses_is_an_error_in_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """These were tracebacks."""
    fail_with(monkeypatch, error)
    result = run("verify", "x")
    assert (result.exit_code, result.stderr) == (2, f"hooklens: {message}\n")


def test_ctrl_c_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    result = run("verify", "x")
    assert result.exit_code == 130
    assert "hooklens: interrupted; the command has not finished" in result.stderr
    assert "Traceback" not in result.output


def test_closed_pipe_is_no_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    result = run("verify", "x")
    assert (result.exit_code, result.output) == (1, "")


def list_commands() -> list[str]:
    return [command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.mark.parametrize("command", [None, *list_commands()])
def test_help_tells_the_exit_codes(run: Run, command: str | None) -> None:
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    told = " ".join(result.stdout.split())
    assert "Exit codes: 0 success" in told
    for code in ("2 an error, told on stderr", "70 a fault of HookLens", "130 interrupted with Ctrl-C"):
        assert code in told
    assert ("; 1 " in told) == (command in (None, "verify", "score", "plan"))


def test_output_that_the_encoding_lacks_is_escaped(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text beyond the terminal's encoding was a traceback in the middle of the output."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with pytest.raises(SystemExit) as ended:
        app(["generate", str(checkpoint), "Mary \u6f22", "--max-new-tokens", "1"])
    sys.stdout.flush()
    assert ended.value.code == 0
    assert written.getvalue().startswith(b"Mary \\u6f22")


PROMPTS = ("--clean", "Mary gave a drink to", "--corrupted", "John gave a drink to", "--answer", "John")


def call(run: Run, command: str, model: object, folder: Path, *more: str) -> Result:
    """The command with arguments that are right, and others behind them."""
    (folder / "prefix").write_text("When Mary and John went to the store ,")
    (folder / "items").write_text('{"continuation": " John"}\n')
    arguments = {
        "info": [model],
        "verify": [model],
        "demo": ["--model", model],
        "generate": [model, "Mary", "--max-new-tokens", 2],
        "convert": [model, folder / "converted", "--overwrite"],
        "patch": [model, *PROMPTS, "--out", folder / "patched.csv"],
        "score": [model, "--prefix", folder / "prefix", "--items", folder / "items", "--out", folder / "results"],
    }[command]
    return run(command, *arguments, *more)


def check_ending(result: Result) -> None:
    """A message for a user: no traceback, no fault of HookLens."""
    assert result.exit_code in (0, 1, 2), result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if result.exit_code == 2:
        assert result.stderr.strip()


OPTIONS = {
    "generate": [
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--stop",
        "--seed",
    ],
    "patch": ["--wrong", "--site", "--out", "--top", "--clean", "--corrupted", "--answer"],
    "convert": ["--dtype", "--max-shard-size"],
    "score": ["--prefix", "--items", "--out", "--batch-size", "--target-delimiter"],
    "info": ["--unknown"],
    "verify": ["--unknown"],
    "demo": ["--model"],
}
# Small numbers of tokens, and no folder outside the test's own.
VALUES = [
    "",
    "0",
    "-1",
    "7",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "abc",
    "\udcff",
    "é",
    "\n",
    ".",
    "..",
    "None",
    "0.5",
    "x" * 300,
]


@pytest.mark.parametrize("n_examples", [25, pytest.param(60, marks=pytest.mark.slow)])
def test_any_value_of_any_option_ends_in_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, n_examples: int
) -> None:
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=n_examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        end_in_words(run, checkpoint, tmp_path, data)

    check()


def end_in_words(run: Run, checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    command, option = data.draw(st.sampled_from([(name, one) for name, list_ in OPTIONS.items() for one in list_]))
    value = data.draw(st.sampled_from(VALUES) | st.text(min_size=1, max_size=5).filter(lambda text: "/" not in text))
    check_ending(call(run, command, checkpoint, tmp_path, option, value))


def truncate(name: str, n_bytes: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": truncate("config.json", 100),
    "empty config": truncate("config.json", 0),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config of bytes": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
    "another family": lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "t5"})),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": truncate("model.safetensors", 100_000),
    "no header": truncate("model.safetensors", 4),
    "empty weights": truncate("model.safetensors", 0),
}


@pytest.mark.parametrize(("command", "damage"), list(itertools.product(sorted(OPTIONS), DAMAGES)))
def test_a_damaged_checkpoint_ends_in_words(
    run: Run, checkpoint: Path, tmp_path: Path, command: str, damage: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    DAMAGES[damage](broken)
    result = call(run, command, broken, tmp_path)
    check_ending(result)
    assert result.exit_code == 2
    assert result.stderr.startswith("hooklens: ")
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "patched.csv").exists()
