"""Every object that shows itself: short as text, small and well-formed as HTML, and never a failure."""

import importlib
import pkgutil
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hooklens
from hooklens.display import MOST_COLUMNS, MOST_LINES, Displayed
from hooklens.display.summary import MOST_BYTES
from tests.display.objects import HOSTILE, OBJECTS, ODD

ALL = {**{kind.__name__: make for kind, make in OBJECTS.items()}, **ODD}
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


def test_every_class_that_shows_itself_is_tried():
    for module in pkgutil.walk_packages(hooklens.__path__, "hooklens."):
        if not module.name.startswith(("hooklens.cli", "hooklens.compat", "hooklens.__main__")):
            importlib.import_module(module.name)
    tells = [kind for kind in set(_subclasses(Displayed)) if "_summary" in vars(kind)]
    missing = [kind for kind in tells if not any(issubclass(tried, kind) for tried in OBJECTS)]
    assert not [kind.__name__ for kind in missing if kind.__module__.startswith("hooklens.")]


def _subclasses(kind: type) -> list[type]:
    return [one for direct in kind.__subclasses__() for one in (direct, *_subclasses(direct))]


def test_what_gives_a_table_shows_itself():
    import_all = [module.name for module in pkgutil.walk_packages(hooklens.__path__, "hooklens.")]
    silent = []
    for name in import_all:
        if name.startswith(("hooklens.cli", "hooklens.compat", "hooklens.__main__")):
            continue
        for kind in vars(importlib.import_module(name)).values():
            if isinstance(kind, type) and "to_dataframe" in vars(kind) and not hasattr(kind, "_repr_html_"):
                silent.append(kind.__name__)
    # A protocol, which has no objects.
    assert set(silent) <= {"_Result"}


def test_no_weight_is_looked_at():
    """A display of a model or a cache makes no tensor of a size of its own."""
    for name in ("HookedCausalLM", "ActivationCache", "HookedKeyValueCache", "FactoredMatrix", "cache of many layers"):
        shown = ALL[name]()
        with LargestMade() as made:
            repr(shown)
            shown._repr_html_()
        assert made.numel <= 16, name
