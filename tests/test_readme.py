"""What the README says can be done can be done."""

import re
from operator import attrgetter
from pathlib import Path

import hooklens as hl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_ci_runs_the_readmes_test_command() -> None:
    """A checkout that CI accepts is one on which a reader's first command works."""
    *_, test_command = code_blocks("bash")
    assert test_command.strip().endswith("-m pytest -n auto")
    assert test_command.strip() in [line.removesuffix(" </dev/null") for line in CI.splitlines()]


def test_commands_install_the_tested_versions() -> None:
    commands = code_blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.count("-m venv") == command.count("pip install -c constraints.txt -e ") == 1


def test_the_example_shows_what_it_prints() -> None:
    """`tests/documentation/test_pages.py` runs it, and compares."""
    (example,) = code_blocks("python")
    assert len(re.findall(r"^print\(.*\)  # .+$", example, flags=re.MULTILINE)) >= 2


def test_names_in_the_table_exist() -> None:
    """The table named `analysis.logit_lens`, which is `analysis.lens.logit_lens`."""
    places = {
        "HookedCausalLM": hl.HookedCausalLM,
        "analysis": hl.analysis,
        "cache": hl.ActivationCache,
        "hl": hl,
        "model": hl.HookedCausalLM.from_pretrained("bundled:tiny-llama"),
        "patching": hl.patching,
    }
    page = (ROOT / "docs" / "what_there_is.md").read_text(encoding="utf-8")
    table = "".join(line for line in page.splitlines() if line.startswith("| "))
    names = re.findall(rf"(?<![.\w])({'|'.join(places)})\.(\w+(?:\.\w+)*)", table)
    assert {place for place, _ in names} == places.keys()
    for place, name in names:
        assert attrgetter(name)(places[place]) is not None, f"{place}.{name}"


def test_constraints_fix_every_version_once_per_python() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [
        line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+( ; python_version (<|>=) \"3\.11\")?", line)
    ] == []
    keys = [re.sub(r"==[\w.]+", "", line).lower() for line in lines]
    assert len(keys) == len(set(keys))
    assert {"torch==2.13.0", 'transformers==5.23.0 ; python_version >= "3.11"'} <= set(lines)
