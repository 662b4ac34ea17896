"""What the pages and the README show runs as it stands there, prints what they say, and gives what they quote."""

import importlib.util
from pathlib import Path

import pytest

from tests.documentation.pages import DOCS, ROOT, pages, read_blocks, run_page, run_text

PAGES = pages(of_errors=False)
MOST_NOT_RUN = 4
# Packages of extras that the tests' own does not bring.
NEEDS = {"harness.md": ("lm_eval", "harness"), "ray.md": ("ray", "ray")}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_code_runs(path: Path) -> None:
    package, extra = NEEDS.get(path.name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'hooklens[{extra}]'")
    problems = run_page(path).problems
    assert not problems, "\n".join(problems)


def test_few_blocks_are_not_run() -> None:
    left_out = [
        (path.name, block.line, block.not_run)
        for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
        for block in read_blocks(path.read_text(encoding="utf-8"))
        if block.not_run is not None
    ]
    assert len(left_out) <= MOST_NOT_RUN, left_out


def test_every_block_of_python_is_seen() -> None:
    """One that is indented, or has more behind its fence, would be passed over."""
    for path in (ROOT / "README.md", *DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        seen = [block for block in read_blocks(text) if block.language == "python"]
        assert text.count("```py") == len(seen), path.name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```python\nprint(1)  # 1\n```\n", None),
        ("```python\nprint(1)  # 2\n```\n", "says it prints '2'"),
        ("```python\nprint(0.12345)  # 0.12\n```\n", None),
        ("```python\nprint(0.12345)  # 0.13\n```\n", "says it prints '0.13'"),
        ("```python\nx = 1\n```\n\n```python\nprint(x + 1)  # 2\n```\n", None),
        ("```python\nx = 0.5\n```\nIt is **0.5**<!-- x -->.\n", None),
        ("```python\nx = 0.5\n```\nIt is **0.7**<!-- x -->.\n", "quotes x as 0.7"),
        ("```python\nraise ValueError('no')\n```\n", "ValueError: no"),
        ("<!-- not run: it fails -->\n```python\nraise ValueError('no')\n```\n", None),
        ("```python\nif True:\n    print(1)\n```\n", None),
    ],
)
def test_a_page_is_held_to_what_it_says(text: str, problem: str | None) -> None:
    found = run_text(text, "page.md").problems
    assert (found == []) if problem is None else problem in found[0]


def test_blocks_with_a_title_are_files(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```yaml title="a.yaml"\nx: 1\n```\n```python\nprint(open("a.yaml").read().strip())  # x: 1\n```\n')
    assert run_page(page).problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
