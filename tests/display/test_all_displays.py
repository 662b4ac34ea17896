"""Every object that shows itself: short as text, small and well-formed as HTML, and never a failure."""

import ast
import importlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hooklens
from hooklens.display import MOST_COLUMNS, MOST_LINES, Displayed
from hooklens.display.summary import MOST_BYTES
from tests.display.objects import HOSTILE, OBJECTS, ODD

ALL = {**{kind.__name__: make for kind, make in OBJECTS.items()}, **ODD}
PACKAGE = Path(hooklens.__file__).parent
_VOID = {"br", "meta", "wbr"}


class Page(HTMLParser):
    """Opens and closes in order; keeps tags, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class LargestMade(TorchDispatchMode):
    """The largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("name", ALL)
def test_text_is_short(name):
    text = repr(ALL[name]())
    lines = text.split("\n")
    assert len(lines) <= MOST_LINES, text
    assert max(map(len, lines)) <= MOST_COLUMNS, text
    assert len(text.splitlines()) == len(lines), "a line break of a name is no line break of the text"
    assert "tensor(" not in text


@pytest.mark.parametrize("name", ALL)
def test_page_is_small_and_needs_nothing(name):
    html = ALL[name]()._repr_html_()
    page = Page(html)
    assert not page.open
    assert len(html.encode()) <= MOST_BYTES
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in page.attributes)
    assert not any(word in html for word in ("http", "url(", "@import"))
    assert "b" not in page.tags, "a name is text, not markup"
    assert "\x00" not in html


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("BlockConfig",)])
def test_both_forms_have_one_title(name):
    """A title stood in the text alone, or in the page alone."""
    shown = ALL[name]()
    first = "".join(shown._summary().title.split())[:60]
    assert first[:20] in "".join("".join(Page(shown._repr_html_()).texts).split())


def test_hostile_names_are_shown_as_they_are():
    for name in ("Pair", "CircuitResult", "SteeringVector", "KnownCheck", "ModelComparison"):
        assert "</script><b>&" in "".join(Page(ALL[name]()._repr_html_()).texts), name
    assert HOSTILE.startswith("</script><b>&")


def _defining(method: str) -> set[type]:
    """The classes of the package whose body has a method."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if not {"cli", "compat"} & set(path.relative_to(PACKAGE).parts):
            text = path.read_text(encoding="utf-8")
            if f"def {method}(" in text:
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.ClassDef) and any(getattr(one, "name", "") == method for one in node.body):
                        found.add(getattr(importlib.import_module(module), node.name))
    return found


def test_every_class_that_shows_itself_is_tried():
    silent = [kind for kind in _defining("_summary") if not any(issubclass(tried, kind) for tried in OBJECTS)]
    assert not [kind.__name__ for kind in silent if kind is not Displayed]


def test_what_gives_a_table_shows_itself():
    silent = {kind.__name__ for kind in _defining("to_dataframe") if not hasattr(kind, "_repr_html_")}
    # A protocol, which has no objects.
    assert silent == {"_Result"}


def test_no_weight_is_looked_at():
    """A display of a model or a cache makes no tensor of a size of its own."""
    for name in ("HookedCausalLM", "ActivationCache", "HookedKeyValueCache", "FactoredMatrix", "cache of many layers"):
        shown = ALL[name]()
        with LargestMade() as made:
            repr(shown)
            shown._repr_html_()
        assert made.numel <= 16, name
