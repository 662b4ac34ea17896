"""The rules that keep the package readable: who imports whom, and who may know what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import FLOORS, HEAVY, ROWS, SourceTree

ROOT = Path(__file__).parents[1]
# Of code: an interface is allowed to be long where it is long because it is explained.
MOST_LINES = 450
# Calls of functions that `import hooklens` may make on top of `import torch`: a notebook's first cell is no place to
# wait. Some 60 thousand take 0.2 seconds of a processor; one package that is heavy to import makes several hundred
# thousand.
MOST_CALLS = 73_000


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return SourceTree(ROOT / "hooklens")


def test_imports_go_down_the_rows(tree: SourceTree) -> None:
    assert tree.row_violations() == []


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down_the_floors_of_a_package(tree: SourceTree, package: str) -> None:
    assert tree.floor_violations(package) == []


def test_no_import_cycles(tree: SourceTree) -> None:
    assert tree.cycles() == []


def test_no_import_hides_in_a_function(tree: SourceTree) -> None:
    assert tree.hidden_imports() == []


def test_heavy_packages_are_imported_when_used(tree: SourceTree) -> None:
    assert tree.heavy_imports() == []


def test_no_family_name_outside_adapters_and_bundled(tree: SourceTree) -> None:
    assert tree.family_words() == []


def test_family_words_know_every_adapter(tree: SourceTree) -> None:
    """A family without a pattern in FAMILY_WORD could be named anywhere."""
    families = [name for name in tree.modules if name.startswith("hooklens.adapters.families.")]
    assert families
    unseen = [name for name in families if not list(tree.modules[name].family_words())]
    assert unseen == []


def test_no_file_without_a_concept(tree: SourceTree) -> None:
    nameless = {"utils", "util", "helpers", "helper", "misc", "common"}
    # What code written for another library imports has its names there.
    ours = [name for name in tree.modules if not name.startswith("hooklens.compat.transformer_lens.")]
    assert [name for name in ours if nameless & set(name.split("."))] == []


def test_no_file_outgrows_its_idea(tree: SourceTree) -> None:
    lines = {name: module.n_code_lines for name, module in tree.modules.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_contributing_lists_the_same_rows() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [f"{number}  {'  '.join(parts)}" for number, parts in enumerate(ROWS, start=1)]
    assert [row for row in rows if row not in text] == []


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.stdout


@pytest.fixture(scope="module")
def imported() -> tuple[int, set[str]]:
    """What `import hooklens` adds to `import torch`, in a process of its own: calls of functions, and modules.

    The calls by which modules are looked for are left out: they are as many as there are folders to look into.
    """
    code = """
import sys, torch

before, calls = set(sys.modules), 0

def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call") and not frame.f_code.co_filename.startswith("<frozen importlib")

sys.setprofile(count)
import hooklens
sys.setprofile(None)
print(calls, *(set(sys.modules) - before))
"""
    calls, *modules = run_python(code).split()
    return int(calls), set(modules)


def test_import_loads_no_heavy_package(imported: tuple[int, set[str]]) -> None:
    """torch itself may bring some of them, so what counts is what `import hooklens` adds."""
    _, modules = imported
    assert "hooklens" in modules
    assert modules & HEAVY == set()


def test_import_is_quick(imported: tuple[int, set[str]]) -> None:
    """Calls are counted, not seconds: their number is the same on every machine, however busy, and cached or not."""
    calls, _ = imported
    assert calls < MOST_CALLS


@pytest.fixture
def bad_tree(tmp_path: Path) -> SourceTree:
    """A package that breaks every rule once."""
    folder = tmp_path / "hooklens"
    sources = {
        "__init__.py": "",
        "errors.py": "",
        "config.py": "from hooklens import model\n",
        "hooks/__init__.py": "from hooklens.config import x\n",
        "hooks/point.py": "import hooklens.axes\nfrom hooklens import __version__\n",
        "axes.py": "from .errors import x\n",
        "model/__init__.py": "from hooklens.model.block import x\n",
        "model/block.py": "from hooklens.model import x\n",
        "weights.py": "def f():\n    import json\n    import_package('hooklens.model')\n    __import__('os')\n",
        "tokens.py": "import pandas.core\nif TYPE_CHECKING:\n    import transformers\n",
        "stray.py": "",
        "patching/__init__.py": "from hooklens.patching.paths import x\n",
        "patching/errors.py": "",
        "patching/paths.py": "from hooklens.patching.errors import x\nfrom hooklens.patching.sweeps import x\n",
        "patching/sweeps.py": "",
        "patching/spare.py": "",
        "causal_lm.py": "load_llama = 1  # 'bundled:tiny-llama' and llama3 pass, GPT2 does not\n",
    }
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return SourceTree(folder)


def test_checks_report_what_breaks_the_rules(bad_tree: SourceTree) -> None:
    assert bad_tree.row_violations() == [
        "hooklens.axes:1 imports .errors: write the absolute name",
        "hooklens.config:1 imports hooklens.model: model does not stand in a row below config",
        "hooklens.hooks:1 imports hooklens.config: config does not stand in a row below hooks",
        "hooklens.hooks.point:2 imports hooklens: import the module that defines the name",
        "hooklens.stray: 'stray' stands in no row; add it to ROWS and CONTRIBUTING.md",
    ]
    assert bad_tree.floor_violations("patching") == [
        "hooklens.patching.paths:2: sweeps does not stand on a floor below paths",
        "hooklens.patching.spare: 'spare' stands on no floor; add it to FLOORS",
    ]
    assert bad_tree.cycles() == [["hooklens.model", "hooklens.model.block"]]
    assert bad_tree.hidden_imports() == [
        "hooklens.weights:2 imports json inside a function",
        "hooklens.weights:3 hides an import of the package's own module",
        "hooklens.weights:4 imports by name; use optional.import_package",
    ]
    assert bad_tree.heavy_imports() == [
        "hooklens.tokens:1 imports pandas.core at module level; use optional.import_package"
    ]
    assert bad_tree.family_words() == ["hooklens.causal_lm:1 says 'llama'", "hooklens.causal_lm:1 says 'GPT2'"]
