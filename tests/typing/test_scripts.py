"""What type checkers say of users' scripts: nothing of right ones, and each mistake of wrong ones.

`right` holds scripts as users write them, with `assert_type` where a type matters; they run, too. In `wrong` a comment
`# wrong: <code of mypy> <rule of pyright>` stands on each line that is a mistake. Both checkers are as strict as they
get: a script that the strict modes pass, every mode passes. `basedpyright` is pyright, from a wheel that brings the
program and what runs it; pyrightconfig.json has it check what pyright's strict mode does.
"""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RIGHT = sorted((HERE / "right").glob("*.py"))
WRONG = sorted((HERE / "wrong").glob("*.py"))
# mypy begins without its cache in a new environment.
CHECKERS = [pytest.param("mypy", marks=pytest.mark.long), "pyright"]
MARK = re.compile(r"# wrong: (?P<mypy>\S+) (?P<pyright>\S+)$")

Found = dict[tuple[str, int], set[str]]
"""By script and line, the codes or rules of what is reported there."""


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; the extra `lint` brings it")


@pytest.fixture(scope="module")
def mypy() -> Found:
    """All scripts in one run, which shares its cache with the check of the package itself."""
    need("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", *map(str, [*RIGHT, *WRONG])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Found = defaultdict(set)
    for line in done.stdout.splitlines():
        if reported := re.match(r"(?P<path>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$", line):
            found[Path(reported["path"]).name, int(reported["line"])].add(reported["code"])
        else:
            assert ": note: " in line, line
    return found


@pytest.fixture(scope="module")
def pyright() -> Found:
    need("basedpyright")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(HERE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(RIGHT) + len(WRONG)
    found: Found = defaultdict(set)
    for one in report["generalDiagnostics"]:
        assert one["severity"] == "error", one
        found[Path(one["file"]).name, one["range"]["start"]["line"] + 1].add(one["rule"])
    return found


def marked(script: Path, checker: str) -> dict[int, str]:
    """The lines of a script that are mistakes, with what the checker calls them."""
    lines = enumerate(script.read_text(encoding="utf-8").splitlines(), start=1)
    return {number: mark[checker] for number, line in lines if (mark := MARK.search(line))}


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("script", RIGHT, ids=lambda script: script.stem)
def test_right_scripts_pass(checker: str, script: Path, request: pytest.FixtureRequest) -> None:
    found: Found = request.getfixturevalue(checker)
    assert {line: codes for (name, line), codes in found.items() if name == script.name} == {}


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("script", WRONG, ids=lambda script: script.stem)
def test_each_mistake_is_reported(checker: str, script: Path, request: pytest.FixtureRequest) -> None:
    """A misspelt keyword of a call passed, since what a module's call takes and gives was anything."""
    expected = marked(script, checker)
    assert len(expected) > 10
    found: Found = request.getfixturevalue(checker)
    reported = {line: codes for (name, line), codes in found.items() if name == script.name}
    # A mistake may bring others: what comes out of it is not known either.
    assert {line: expected[line] for line in expected if expected[line] not in reported.get(line, set())} == {}
    assert reported.keys() - expected.keys() == set()


@pytest.mark.parametrize("script", RIGHT, ids=lambda script: script.stem)
def test_right_scripts_run(script: Path) -> None:
    runpy.run_path(str(script))
