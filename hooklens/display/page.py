"""Where displays stand: a fragment for a notebook, with its styles, and a document for a file."""

import re
from functools import cache
from pathlib import Path

from hooklens.display.elements import Child, element, render

_HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
)
_PAGE_STYLE = ":root{color-scheme:light dark}body{margin:1.5em auto;padding:0 1em;max-width:75em}"
# A script finds the displays of its kind that none has set up: notebooks run scripts wherever they like, so that a
# script cannot know its own place, and run them again when a page is opened.
_SET_UP = (
    "(()=>{{const setUp=root=>{{{script}}};"
    "document.querySelectorAll('.hooklens[data-view=\"{kind}\"]:not([data-ready])')"
    ".forEach(root=>{{root.dataset.ready='';setUp(root)}})}})()"
)


@cache
def read_asset(path: Path) -> str:
    """A style or script that lies beside the module that uses it, without line breaks between rules of a style."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"\n\s*", "" if path.suffix == ".css" else "\n", text).strip()


def fragment(*children: Child, label: str, kind: str | None = None, style: str = "", script: str = "") -> str:
    """A part of a page that brings its styles with it.

    Args:
        children: what it shows.
        label: what it is, in a few words, for those who do not see it.
        kind: the kind of view, for its styles and its script; needed where there is a script.
        style: rules beyond the theme's.
        script: statements that set the view up, with `root`, its outermost element; each view is set up once.
    """
    theme = read_asset(Path(__file__).with_name("theme.css"))
    root = element(
        "div",
        element("style", theme + style),
        *children,
        class_="hooklens",
        role="group",
        aria_label=label,
        data_view=kind,
    )
    written = render(root)
    if script:
        written += render(element("script", _SET_UP.format(script=script, kind=kind)))
    return written


def document(title: str, body: str) -> str:
    """A whole document of one fragment."""
    head = render(element("title", title)) + render(element("style", _PAGE_STYLE))
    return f"{_HEAD}{head}</head>\n<body>{body}</body></html>\n"
