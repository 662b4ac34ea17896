"""References from one value of a configuration to another: `${.models._pretrained_}`, as OmegaConf reads them.

A dot in front means the mapping that the text stands in, each further one the mapping around that; without dots a
reference starts at the top. OmegaConf can also call functions from a text (`${oc.env:TOKEN}`): a file must not reach
into the environment, so they have to be allowed by name.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hooklens.optional import import_package
from hooklens.pool.config.document import Document, Keys
from hooklens.pool.errors import PoolError

_REFERENCE = re.compile(r"\$\{(\.*)([^${}:]+)\}")
_CALL = re.compile(r"\$\{\s*([\w.]+)\s*:[^{}$]*\}")
_SEPARATORS = re.compile(r"[.\[\]]+")


def list_texts(content: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """All texts in nested values, and where they stand."""
    if isinstance(content, str):
        yield keys, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from list_texts(value, (*keys, str(key)))
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from list_texts(value, (*keys, str(place)))


def find_references(content: Any) -> set[Keys]:
    """What the texts in nested values refer to, as paths from the top."""
    found = set()
    for keys, text in list_texts(content):
        for dots, path in _REFERENCE.findall(text):
            above = keys[: -len(dots)] if dots else ()
            found.add((*above, *filter(None, _SEPARATORS.split(path))))
    return found


def resolve(document: Document, *, resolvers: Collection[str] = ()) -> Document:
    """The document with each reference replaced by what it refers to.

    Args:
        document: a configuration; without references it needs no OmegaConf.
        resolvers: names of OmegaConf's functions that its texts may call: `"oc.env"` reads the environment.

    Raises:
        PoolError: a text calls another function, or a reference leads nowhere; with file and line.
        MissingDependencyError: OmegaConf is needed and not installed.
    """
    texts = [(keys, text) for keys, text in list_texts(document.content) if "${" in text]
    if not texts:
        return document
    problems = [problem for keys, text in texts for problem in _refusals(document.at(keys), text, resolvers)]
    if problems:
        raise PoolError("; ".join(problems))
    omegaconf = import_package("omegaconf")
    try:
        made = omegaconf.OmegaConf.create(document.content, flags={"allow_objects": True})
        content = omegaconf.OmegaConf.to_container(made, resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        keys = tuple(filter(None, _SEPARATORS.split(error.full_key or "")))
        raise PoolError(f"{document.at(keys)}: {str(error).partition(chr(10))[0]}") from error
    except RecursionError as error:
        raise PoolError(f"{document.where}: its references lead in a circle") from error
    return Document(content, document.where, document.lines)


def _refusals(place: str, text: str, resolvers: Collection[str]) -> Iterator[str]:
    calls = set(_CALL.findall(text)) - set(resolvers)
    for name in sorted(calls):
        yield (
            f"{place} is {text!r}, which calls {name!r}; a file may only refer to its own values "
            f"(${{models.name}}): resolvers=[{name!r}] allows the call"
        )
    if not calls and "${" in _CALL.sub("", _REFERENCE.sub("", text)):
        yield f"{place} is {text!r}, expected plain references such as ${{models.name}} or ${{.models.name}}"
