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

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
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


def run_notebook(path: Path, names: list[str]) -> dict[str, Any]:
    """Execute a notebook in this Python and return the values of some of its variables."""
    notebook = copy.deepcopy(read(path))
    report = (
        f"import json, sys\nprint(json.dumps({{'python': sys.executable, **{{n: globals()[n] for n in {names!r}}}}}))"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(report))
    NotebookClient(notebook, kernel_name="python3", **NO_LIMITS).execute()
    values: dict[str, Any] = json.loads(notebook.cells[-1].outputs[0].text)
    return values


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_quotes_what_it_computes(path: Path) -> None:
    quotes = find_quotes(read(path))
    assert quotes, "a tutorial whose text quotes nothing is not held to anything"
    values = run_notebook(path, [name for _, name in quotes])
    assert values.pop("python") == sys.executable
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
