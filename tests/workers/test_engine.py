"""The arguments `engine` and `workers`, and the models that go to other processes; without Ray."""

import sys
from pathlib import Path

import pytest
import torch

from hooklens.errors import InputError, MissingDependencyError
from hooklens.hooks import edits
from hooklens.workers import check_portable, read_engine
from hooklens.workers.work import Settings
from tests.datasets.test_recording import record_small
from tests.model.networks import make_model

MODEL = make_model("grouped")


def test_engines() -> None:
    assert read_engine("local", None, what="f") == ("local", None)
    assert read_engine("ray", None, what="f") == ("ray", None)
    assert read_engine("ray", 3, what="f") == ("ray", 3)
    with pytest.raises(InputError, match=r"f: engine is 'spark', expected 'local' or 'ray'"):
        read_engine("spark", None, what="f")
    with pytest.raises(InputError, match=r"f: workers is 0, expected a whole number >= 1"):
        read_engine("ray", 0, what="f")
    with pytest.raises(InputError, match=r"f: workers is 2, and engine='local' computes in this process; give engine="):
        read_engine("local", 2, what="f")


def test_without_ray_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is None here is not found by imports.
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"'ray' is needed .* pip install 'hooklens\[ray\]'"):
        record_small(tmp_path / "set", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_models_that_workers_cannot_have_are_refused() -> None:
    check_portable(MODEL, what="f")
    with pytest.raises(InputError, match="this model lies on meta; move it to one device"):
        check_portable(make_model("grouped").to("meta"), what="f")
    with (
        MODEL.hooks(edits=[edits.Zero("hook_embed")]),
        pytest.raises(InputError, match=r"act in this thread alone, not on Ray's workers; give edits="),
    ):
        check_portable(MODEL, what="f")
    with torch.autocast("cpu"), pytest.raises(InputError, match=r"autocast is on \(cpu\)"):
        check_portable(MODEL, what="f")


def test_settings_travel() -> None:
    before = Settings.read()
    try:
        other = Settings(
            threads=1,
            precision="high",
            deterministic=1,
            cudnn=(False, True, True),
            attention=(False, True, True, False),
        )
        assert other != before
        other.apply()
        assert Settings.read() == other
    finally:
        before.apply()
    assert Settings.read() == before
