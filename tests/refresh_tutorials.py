"""`python -m tests.refresh_tutorials`: run the tutorials anew, keep the outputs, and bring quoted numbers up to date.

Exercises run with their solutions and stay unsolved in the file.

For when a bundled checkpoint was trained again or a cell changed. Read the text afterwards: a sentence around a
number may no longer be true.
"""

import re
from pathlib import Path

import nbformat

from tests.quotes import QUOTE, format_like
from tests.test_tutorials import TUTORIALS, execute, find_quotes, read


def refresh(path: Path) -> None:
    """Execute a notebook in place."""
    notebook = read(path)
    values = execute(notebook, [name for _, name in find_quotes(notebook)])

    def requote(match: re.Match[str]) -> str:
        return f"**{format_like(match['text'], values[match['name']])}**<!-- {match['name']} -->"

    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        if cell.cell_type == "markdown":
            cell.source = QUOTE.sub(requote, cell.source)
        else:
            # Warnings name files of this machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        refresh(tutorial)
