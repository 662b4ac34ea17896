"""The demos run from beginning to end and find what their text says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hooklens.patching import Circuit

DEMOS = Path(__file__).parents[1] / "demos"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEMOS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_indirect_object(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("indirect_object")
    numbers = demo.main(["--model", f"bundled:{name}", "--pairs", "4", "--out", str(tmp_path / "out")])
    assert numbers["clean"] > 4 > -4 > numbers["corrupted"]
    # A few heads carry most of the effect, and a small part of the edges keeps four fifths of it.
    assert numbers["best head restores"] > 0.4
    assert numbers["edges"] < numbers["all edges"] / 10
    figures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures == {"1_stream.png", "2_heads_restore.png", "3_heads_needed.png", "4_patterns.png", "5_circuits.png"}
    assert len(Circuit.load(tmp_path / "out" / "circuit.json")) == numbers["edges"]
    printed = capsys.readouterr().out
    assert [line for line in range(1, 7) if f"{line}. " not in printed] == []


def test_too_few_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("indirect_object").main(["--pairs", "1", "--out", str(tmp_path)])
    assert "means need at least 2" in capsys.readouterr().err


def test_without_matplotlib_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo broke off in its imports, with a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        load("indirect_object").main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "the package 'matplotlib' is needed here and is not installed" in told
    assert "pip install 'hooklens[plot]'" in told
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        load("indirect_object").main(["--model", "bundled:tiny-lama", "--out", str(tmp_path / "out")])
    assert "Did you mean 'tiny-llama'" in capsys.readouterr().err
