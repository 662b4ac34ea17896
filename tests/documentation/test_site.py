"""What the site is built with: its settings, its list of pages, and the two programs that help."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.documentation.pages import DOCS, ROOT

SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = re.findall(r"([\w/]+\.md)$", SETTINGS.partition("\nnav:\n")[2], re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_nothing_is_fetched_when_a_page_is_read() -> None:
    assert "font: false" in SETTINGS
    # The plugin `offline` takes a script for the search from a network.
    assert not re.search(r"^extra_javascript:|cdn|unpkg|googleapis|- offline", SETTINGS, re.MULTILINE)
    for path in (*DOCS.rglob("*.css"), *DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|link|iframe)\b[^>]*https?://|@import|url\(https?:", text), path.name


def test_ci_builds_the_site_and_lets_no_warning_pass() -> None:
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "strict: true" in SETTINGS
    assert "/site/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_links_inside_of_the_repository_lead_somewhere() -> None:
    """Pages are checked by the build; files beside the pages, in the repository, are not."""
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(((?:\.\./)+[^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_links_to_files_lead_to_the_repository() -> None:
    rewrite = load("links").on_page_markdown
    config = SimpleNamespace(repo_url="https://example.org/one/")
    files = [SimpleNamespace(src_uri="circuits.md"), SimpleNamespace(src_uri="guide/look.md")]
    text = "[a](../tutorials/01.ipynb) [b](../circuits.md) [c](guide/look.md) [d](../../CONTRIBUTING.md#x)"
    found = rewrite(text, page=None, config=config, files=files)
    assert found == (
        "[a](https://example.org/one/blob/main/tutorials/01.ipynb) [b](../circuits.md) [c](guide/look.md) "
        "[d](https://example.org/one/blob/main/CONTRIBUTING.md#x)"
    )


def test_arguments_described_together_become_entries_of_their_own() -> None:
    pytest.importorskip("griffe", reason="the extra `docs` is not installed")
    split = load("joined_arguments").split_arguments
    lines = ["Do it.", "", "Args:", "    first: alone."]
    several = ["    device, dtype: where, and", "        in what."]
    rest = ["", "Returns:", "    left, right: both."]
    apart = ["    device: where, and", "        in what.", "    dtype: where, and", "        in what."]
    assert split("\n".join([*lines, *several, *rest])).splitlines() == [*lines, *apart, *rest]


def test_pages_name_no_machine() -> None:
    for path in Path(DOCS).rglob("*"):
        if path.suffix in (".md", ".py", ".css"):
            text = path.read_text(encoding="utf-8")
            assert str(Path.home()) not in text, path.name
            assert str(ROOT) not in text, path.name
