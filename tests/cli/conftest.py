"""An untrained checkpoint with the bundled models' architecture and tokenizer, and a way to call commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from hooklens.bundled.architectures import N_CTX, build_model
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.cli import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "untrained"
    torch.manual_seed(0)
    build_model("tiny-llama").save_pretrained(folder)
    build_tokenizer(n_ctx=N_CTX).save_pretrained(folder)
    return folder


@pytest.fixture
def run() -> Run:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
