"""Exercises in the tutorials: three cells that follow each other, and how a notebook is run with them solved.

- tagged `exercise`: a function whose body raises `NotImplementedError`, for the reader to write;
- tagged `check`: one call of a check in `tutorials/exercises.py`, whose verdict is the cell's output;
- tagged `solution`: text with hints and the solution, folded, whose block of Python is the function written out.

The reader's cell stays unsolved in the file. A run for the test, or for the outputs that are kept, has the solution's
code in its place.
"""

import copy
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parents[1] / "tutorials"
KINDS = ("exercise", "check", "solution")

_CODE = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    Attributes:
        at: which cell of the notebook the reader's is.
        stub: the reader's cell, unsolved.
        check: the cell with the check.
        solution: the code that solves it.
    """

    at: int
    stub: str
    check: str
    solution: str


def kind_of(cell: Any) -> str | None:
    """Which of an exercise's cells a cell is."""
    kinds = [tag for tag in cell.metadata.get("tags", []) if tag in KINDS]
    assert len(kinds) <= 1, kinds
    return kinds[0] if kinds else None


def find_exercises(notebook: Any) -> list[Exercise]:
    """The exercises of a notebook, in order."""
    found = []
    kinds = [kind_of(cell) for cell in notebook.cells]
    for at, kind in enumerate(kinds):
        if kind is None:
            continue
        first = at - KINDS.index(kind)
        assert tuple(kinds[first : first + 3]) == KINDS, f"cell {at} is no part of an exercise, its check and solution"
        if kind == "exercise":
            stub, check, solution = (notebook.cells[at + step].source for step in range(3))
            (code,) = _CODE.findall(solution)
            found.append(Exercise(at, stub, check, code.rstrip("\n")))
    return found


def solve(notebook: Any) -> Any:
    """A copy of a notebook with the solutions in the reader's cells."""
    solved = copy.deepcopy(notebook)
    for exercise in find_exercises(notebook):
        solved.cells[exercise.at].source = exercise.solution
    return solved


def load_checks() -> ModuleType:
    """The module of checks beside the notebooks, which is in no package."""
    name = "exercises"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
