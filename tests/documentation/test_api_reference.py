"""The API's pages name everything that is public."""

import importlib
import pkgutil

import pytest

import hooklens
from tests.documentation.api_reference import FOLDER, ROOMS, WITHIN, make_pages, public_names


def packages() -> list[str]:
    """The package and its packages whose names have no underscore."""
    walked = pkgutil.walk_packages(hooklens.__path__, "hooklens.")
    found = [one.name for one in walked if one.ispkg and not any(part[:1] == "_" for part in one.name.split("."))]
    return ["hooklens", *(name for name in found if hasattr(importlib.import_module(name), "__all__"))]


def test_the_pages_are_what_the_package_makes_public() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    assert written == make_pages(), "run `python -m tests.documentation.api_reference`"


def test_every_package_with_public_names_has_a_page_or_a_reason() -> None:
    """A parent in `WITHIN` speaks for what is inside of it."""
    shown = {module for modules in ROOMS.values() for module in modules}
    missing = [
        name
        for name in packages()
        if name not in shown and not any(name == one or name.startswith(f"{one}.") for one in WITHIN)
    ]
    assert missing == []
    assert set(WITHIN) <= set(packages())
    assert not shown & set(WITHIN)


@pytest.mark.parametrize("module", [module for modules in ROOMS.values() for module in modules])
def test_every_public_name_stands_on_its_page(module: str) -> None:
    page = next(page for page, modules in ROOMS.items() if module in modules)
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    names = public_names(module)
    assert names or module == "hooklens.errors"
    missing = [one.path for one in names if f"::: {one.path}\n" not in text and f"`{one.name}`" not in text]
    assert missing == []


def test_names_that_are_described_elsewhere_are_described_there() -> None:
    """The links lead to a page with a description of that very name."""
    text = (FOLDER / "hooklens.md").read_text(encoding="utf-8")
    described = 0
    for one in public_names("hooklens"):
        if f"::: {one.path}\n" in text:
            continue
        place = text.partition(f"[`{one.name}`](")[2].partition(")")[0]
        page, _, anchor = place.partition("#")
        assert (FOLDER / page).is_file(), one
        if anchor:
            assert f"::: {anchor}\n" in (FOLDER / page).read_text(encoding="utf-8"), one
            described += 1
    assert described >= 25
