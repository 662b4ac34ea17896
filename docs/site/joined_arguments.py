"""Docstrings with several arguments in one entry (`device, dtype: as in ...`) give each an entry of its own."""

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^(?P<indent> *)(?P<title>Args|Attributes):$")
_ENTRY = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")


def split_arguments(docstring: str) -> str:
    """A Google docstring with one entry for each argument or attribute."""
    written: list[str] = []
    lines = docstring.splitlines()
    section: int | None = None
    place = 0
    while place < len(lines):
        line = lines[place]
        place += 1
        indent = len(line) - len(line.lstrip())
        if title := _SECTION.match(line):
            section = len(title["indent"])
        elif line.strip() and section is not None and indent <= section:
            section = None
        entry = _ENTRY.match(line) if section is not None and indent == section + 4 else None
        if entry is None:
            written.append(line)
            continue
        text = [entry["text"]]
        while place < len(lines) and lines[place].startswith(entry["indent"] + " "):
            text.append(lines[place])
            place += 1
        for name in entry["names"].split(", "):
            written += [f"{entry['indent']}{name}: {text[0]}", *text[1:]]
    return "\n".join(written)


class JoinedArguments(Extension):
    """The griffe extension that does so for all of the package."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite an object's docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = split_arguments(obj.docstring.value)
