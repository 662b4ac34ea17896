"""`python -m tests.documentation.api_reference`: write docs/api/, a page for each room of the package.

A page names what a room makes public (`__all__`, and of a module without one, what it defines without an underscore);
mkdocstrings puts signatures and docstrings there when the site is built.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.documentation.pages import DOCS

FOLDER = DOCS / "api"
ROOMS: dict[str, tuple[str, ...]] = {
    "hooklens": ("hooklens",),
    "causal_lm": ("hooklens.causal_lm",),
    "memory": ("hooklens.causal_lm.memory.plan",),
    "activation_cache": ("hooklens.activation_cache",),
    "kv_cache": ("hooklens.kv_cache",),
    "hooks": ("hooklens.hooks", "hooklens.axes"),
    "edits": ("hooklens.hooks.edits",),
    "config": ("hooklens.config",),
    "model": ("hooklens.model", "hooklens.model.moe"),
    "generation": ("hooklens.generation",),
    "documents": ("hooklens.documents",),
    "weights": ("hooklens.weights.factored", "hooklens.weights.merging"),
    "patching": ("hooklens.patching", "hooklens.patching.known"),
    "analysis": (
        "hooklens.analysis",
        "hooklens.analysis.attribution",
        "hooklens.analysis.circuits",
        "hooklens.analysis.copying",
        "hooklens.analysis.heads",
        "hooklens.analysis.lens",
        "hooklens.analysis.sanity",
        "hooklens.analysis.sources",
        "hooklens.analysis.targets",
        "hooklens.analysis.task_vectors",
        "hooklens.analysis.first_report",
    ),
    "alignment": ("hooklens.alignment",),
    "steering": ("hooklens.steering",),
    "evaluation": ("hooklens.evaluation",),
    "training": ("hooklens.training",),
    "pool": ("hooklens.pool",),
    "sae": ("hooklens.sae",),
    "datasets": ("hooklens.datasets",),
    "parallel": ("hooklens.parallel",),
    "viz": ("hooklens.viz",),
    "verification": ("hooklens.verification", "hooklens.verification.conformance"),
    "harness": ("hooklens.harness",),
    "adapters": ("hooklens.adapters", "hooklens.adapters.keys"),
    "compat": ("hooklens.compat", "hooklens.compat.vllm"),
    "errors": ("hooklens.errors", "hooklens.optional"),
}
"""The pages, and the modules that each is about."""

WITHIN = {
    "hooklens.adapters.dequantised": "how checkpoints of few bits are read; `from_pretrained` does",
    "hooklens.adapters.formats": "how old formats are read; `from_pretrained` does",
    "hooklens.adapters.lora": "how adapters of PEFT are read; `from_pretrained(adapter=...)` does",
    "hooklens.adapters.sources": "where checkpoints come from; `from_pretrained` says what it takes",
    "hooklens.adapters.xlstm": "`HookedCausalLM.from_xlstm` and `to_xlstm`",
    "hooklens.cli": "`hooklens --help`",
    "hooklens.compat.names": "what `hooklens.compat` makes public of it stands there",
    "hooklens.display": "what displays are made of",
    "hooklens.tokens": "what `to_tokens` and the other methods of a model are made of",
    "hooklens.workers": 'what `engine="ray"` of other packages is made of',
    "hooklens.verification.explicit": "the network in plain arithmetic, which `verify` compares with",
    "hooklens.compat.transformer_lens": "has the modules and names of TransformerLens 2.x: docs/transformer_lens.md",
}
"""Packages that have an `__all__` for the rest of the package, and no page, with the reason."""


@dataclass(frozen=True)
class Name:
    """A public name of a module.

    Attributes:
        module: where it is public.
        name: what it is called there.
        is_module: it is a module, which has a section of its own.
    """

    module: str
    name: str
    is_module: bool

    @property
    def path(self) -> str:
        """The whole name."""
        return f"{self.module}.{self.name}"


def public_names(module: str) -> list[Name]:
    """What a module makes public, in its order; of one without `__all__`, in the order of the file."""
    found = importlib.import_module(module)
    listed = list(found.__all__) if hasattr(found, "__all__") else list(_defined_in(found))
    return [Name(module, name, isinstance(getattr(found, name), ModuleType)) for name in listed]


def _defined_in(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        own = inspect.isclass(value) or inspect.isfunction(value)
        if not name.startswith("_") and own and value.__module__ == module.__name__:
            yield name


def make_pages() -> dict[str, str]:
    """The text of each page, by file name."""
    return {f"{page}.md": make_page(page) for page in ROOMS}


def make_page(page: str) -> str:
    """The text of a page; what has been described on it is only named the second time."""
    first, *others = ROOMS[page]
    parts, described = [f"# {first}\n"], set()
    for module in (first, *others):
        if module != first:
            parts.append(f"## {module}\n")
        parts.append(f"::: {module}\n    options:\n      members: false\n      show_root_heading: false\n")
        modules, known = [], []
        for one in public_names(module):
            place = _page_of_module(one) if one.is_module else _page_of(one, page)
            if place is not None:
                (modules if one.is_module else known).append(f"[`{one.name}`]({place})")
                continue
            if one.is_module:
                modules.append(f"`{one.name}`")
            elif (key := _identity(one)) in described:
                known.append(f"`{one.name}` (above)")
            else:
                described.add(key)
                parts.append(f"::: {one.path}\n")
        if modules:
            parts.append(f"Modules: {', '.join(modules)}.\n")
        if known:
            parts.append(f"Described elsewhere: {', '.join(known)}.\n")
    return "\n".join(parts)


def _page_of_module(one: Name) -> str | None:
    """The page that is about a module."""
    name = getattr(importlib.import_module(one.module), one.name).__name__
    return next((f"{page}.md" for page, modules in ROOMS.items() if name in modules and name != one.module), None)


def _page_of(one: Name, page: str) -> str | None:
    """Another page that describes a name, where it is public in its own room, too."""
    if page != "hooklens":
        return None
    for other, modules in ROOMS.items():
        for module in modules if other != "hooklens" else ():
            for two in public_names(module):
                if two.name == one.name and _identity(two) == _identity(one):
                    return f"{other}.md#{two.path}"
    return None


def _identity(one: Name) -> int:
    return id(getattr(importlib.import_module(one.module), one.name))


def write_pages(folder: Path = FOLDER) -> None:
    """Write the pages, and remove those of rooms that are no more."""
    made = make_pages()
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pages()
