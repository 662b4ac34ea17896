"""How commands end."""

import pytest

from hooklens.cli import app
from tests.cli.conftest import Run


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
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


def test_other_exceptions_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("hooklens.cli.verify.verify_model", fail)
    assert isinstance(run("verify", "x").exception, RuntimeError)
