"""`python -m tests.documentation.error_pages`: bring docs/errors/ up to date with the errors there are.

Each class of errors and warnings has a page, written by hand: what it means, what to do, and an example, whose last
block ends with it. The messages below the examples, and the page that lists all classes, are written here.
"""

import importlib.util
import inspect
import re
from pathlib import Path

from tests.documentation.pages import DOCS, ROOT, Ran, run_page

FOLDER = DOCS / "errors"
NEEDS = {"WorkerError": "ray"}
"""Packages of extras, each of its name, that examples need and the tests' own extra does not bring."""

_CLASS = re.compile(r"^class (\w+(?:Error|Warning))\(", re.MULTILINE)
_MESSAGE = re.compile(r"^```text\n(?P<message>.*?)\n```$", re.DOTALL | re.MULTILINE)
_HEAD = """# Errors and warnings

Every error that HookLens raises on purpose is a [`HookLensError`](HookLensError.md), and also the built-in error that
fits, so that code which catches `ValueError` or `KeyError` keeps working. A message names its subject, says what was
found, what was expected and what to do, and lists all offenders at once, before work is lost. A page for each class
says what it means, what to do, and shows an example that raises it.

Unknown keywords are a `TypeError`, as in any Python function: nothing takes keywords and drops them.

| class | when |
|---|---|
"""


def error_classes() -> dict[str, type[Exception]]:
    """The classes of errors and warnings of the package, by name."""
    found: dict[str, type[Exception]] = {}
    for path in sorted((ROOT / "hooklens").rglob("*.py")):
        for name in _CLASS.findall(path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = getattr(importlib.import_module(module.removesuffix(".__init__")), name)
    return found


def run_example(name: str) -> Ran:
    """Run the example of a class; warnings end it, too."""
    return run_page(FOLDER / f"{name}.md", warnings_raise=name.endswith("Warning"))


def shown_message(name: str) -> str:
    """The message that a page shows."""
    found = _MESSAGE.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
    assert len(found) == 1, f"{name}.md shows {len(found)} messages"
    return str(found[0])


def wrap_message(name: str, message: str) -> str:
    """A message as Python ends a traceback with it, in lines of a page's width."""
    lines = []
    for line in f"{name}: {message}".splitlines():
        words, row = line.split(" "), ""
        for word in words:
            if row and len(row) + 1 + len(word) > 110:
                lines.append(row)
                row = word
            else:
                row = f"{row} {word}" if row else word
        lines.append(row)
    return "\n".join(lines)


def make_list() -> str:
    """The page that lists all classes."""
    rows = []
    for name, kind in sorted(error_classes().items(), key=lambda one: (one[0].endswith("Warning"), one[0])):
        first = (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")
        rows.append(f"| [`{name}`]({name}.md) | {first} |\n")
    return _HEAD + "".join(rows)


def refresh(path: Path) -> None:
    """Write the message that a page's example ends with."""
    ran = run_example(path.stem)
    text = path.read_text(encoding="utf-8")
    message = wrap_message(path.stem, ran.message)
    path.write_text(_MESSAGE.sub(lambda _: f"```text\n{message}\n```", text), encoding="utf-8")


if __name__ == "__main__":
    (FOLDER / "index.md").write_text(make_list(), encoding="utf-8")
    for page in sorted(FOLDER.glob("[A-Z]*.md")):
        needed = NEEDS.get(page.stem)
        if needed is None or importlib.util.find_spec(needed) is not None:
            refresh(page)
