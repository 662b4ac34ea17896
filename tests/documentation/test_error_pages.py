"""Every class of errors has a page, whose example ends with that error and its message."""

import importlib.util
import re

import pytest

from tests.documentation.error_pages import (
    FOLDER,
    NEEDS,
    error_classes,
    make_list,
    run_example,
    shown_message,
    wrap_message,
)
from tests.documentation.pages import pages, read_blocks

NAMES = sorted(error_classes())
# Numbers with decimals are rounded otherwise on other processors.
_DECIMALS = re.compile(r"\d+\.\d+(e-?\d+)?")


def test_every_class_has_a_page() -> None:
    assert [path.stem for path in pages(of_errors=True)] == NAMES
    assert len(NAMES) >= 30


def test_the_list_is_what_the_classes_say() -> None:
    listed = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert listed == make_list(), "run `python -m tests.documentation.error_pages`"


@pytest.mark.parametrize("name", NAMES)
def test_its_example_raises_it(name: str) -> None:
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}: pip install 'hooklens[{needed}]'")
    ran = run_example(name)
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    blocks = read_blocks(text)
    assert ran.raised[:1] == (name,), ran.problems
    assert ran.at_block == max(i for i, block in enumerate(blocks) if block.language == "python")
    shown, message = (_DECIMALS.sub("x", one) for one in (shown_message(name), wrap_message(name, ran.message)))
    assert shown.split() == message.split(), "run `python -m tests.documentation.error_pages`"
    kind = error_classes()[name]
    assert f"# {name}\n" in text
    for base in kind.__bases__:
        assert base.__name__ in text, f"{name}: the page does not say that it is a {base.__name__}"
    assert [title for title in ("## What it means", "## What to do", "## An example") if title not in text] == []
