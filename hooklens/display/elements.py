"""Elements of HTML, made and written by Python's ElementTree, which escapes all text and attributes."""

import json
from collections.abc import Iterable
from typing import Any, TypeAlias
from xml.etree import ElementTree

Element: TypeAlias = ElementTree.Element
Child: TypeAlias = "Element | str | Iterable[Child] | None"

# Code points that HTML cannot hold: control characters but tab and line feed, and halves of surrogate pairs.
UNWRITABLE = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"},
    127: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Element:
    """An element.

    Args:
        tag: `"div"`, `"td"`, ...
        children: elements, texts, or iterables of them; None is left out.
        attributes: `class_` is `class`, other underscores are hyphens; None and False are left out, True is an
            attribute without a value.
    """
    made = ElementTree.Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else str(value)
            made.set(name.rstrip("_").replace("_", "-"), text.translate(UNWRITABLE))
    _append(made, children)
    return made


def _append(parent: Element, children: Iterable[Child]) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            text = child.translate(UNWRITABLE)
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + text
            else:
                parent.text = (parent.text or "") + text
        elif isinstance(child, ElementTree.Element):
            parent.append(child)
        else:
            _append(parent, child)


def data(name: str, value: Any) -> Element:
    """Values for a script to read, as JSON that nothing in it can end early.

    Args:
        name: the class that the script finds the element by.
        value: what JSON can hold.
    """
    written = json.dumps(value, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    return element("script", written, type="application/json", class_=name)


def render(made: Element) -> str:
    """The element as HTML. The text of scripts and styles is written as it is."""
    return ElementTree.tostring(made, encoding="unicode", method="html")
