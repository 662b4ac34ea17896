"""Every tutorial runs from top to bottom, and the numbers that its text quotes are the ones it computes.

Text quotes a value as `**0.93**<!-- name -->`: bold for the reader, and the name of the notebook's variable for
this test. Numbers hold within rounding to the decimals shown; anything else is compared as text.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.quotes import QUOTE, agrees
from tests.tutorial_exercises import FOLDER, find_exercises, kind_of, solve

TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
NUMBER_WITHOUT_A_NAME = re.compile(r"\*\*[-+]?\d[\d.,]*%?\*\*(?!<!--)")
MOST_BYTES = 200_000
# All may take long on a busy machine. The default of `iopub_timeout` gives up on a cell's output after 4 seconds.
NO_LIMITS: dict[str, Any] = {"timeout": None, "startup_timeout": 3600, "iopub_timeout": 3600}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def find_quotes(notebook: Any) -> list[tuple[str, str]]:
    """Pairs of quoted text and variable name, from all the notebook's text."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [(match["text"], match["name"]) for text in texts for match in QUOTE.finditer(text)]


def execute(notebook: Any, names: list[str]) -> dict[str, Any]:
    """Run a notebook in place, with its exercises solved, and return the values of some of its variables.

    It runs in the folder of the tutorials, as in Jupyter, and in this Python.
    """
    solved = solve(notebook)
    report = (
        f"import json, sys\nprint(json.dumps({{'python': sys.executable, **{{n: globals()[n] for n in {names!r}}}}}))"
    )
    solved.cells.append(nbformat.v4.new_code_cell(report))
    NotebookClient(solved, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}, **NO_LIMITS).execute()
    values: dict[str, Any] = json.loads(solved.cells.pop().outputs[0].text)
    assert values.pop("python") == sys.executable
    for cell, ran in zip(notebook.cells, solved.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    return values


def wrong_verdicts(notebook: Any) -> list[str]:
    """What the checks of a notebook's exercises say, but for those that say that all is right."""
    checks = [cell for cell in notebook.cells if kind_of(cell) == "check"]
    texts = [output.data["text/plain"] for cell in checks for output in cell.outputs]
    assert len(texts) == len(checks)
    return [text for text in texts if not text.startswith("Right: ")]


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize(
    "path",
    # Somebody new begins with the first three.
    [pytest.param(path, marks=() if path.stem < "04" else pytest.mark.long) for path in TUTORIALS],
    ids=lambda path: path.stem,
)
def test_tutorial_runs_and_quotes_what_it_computes(path: Path) -> None:
    notebook = copy.deepcopy(read(path))
    quotes = find_quotes(notebook)
    assert quotes, "a tutorial whose text quotes nothing is not held to anything"
    values = execute(notebook, [name for _, name in quotes])
    assert wrong_verdicts(notebook) == []
    wrong = {name: (text, values[name]) for text, name in quotes if not agrees(text, values[name])}
    assert wrong == {}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_kept_as_its_readers_should_see_it(path: Path) -> None:
    """With the outputs of one run from top to bottom, without errors, and small."""
    notebook = read(path)
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [output for cell in code for output in cell.outputs if output.output_type == "error"] == []
    assert [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert NUMBER_WITHOUT_A_NAME.findall(text) == []
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
    assert wrong_verdicts(notebook) == []
    assert all("NotImplementedError" in exercise.stub for exercise in find_exercises(notebook))
