"""The package's source as a graph of imports and a stream of words, read with `ast` and `tokenize`.

Nothing is imported, so a module that breaks a rule is reported rather than run.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "axes", "arguments", "optional", "precision", "files"),
    ("display", "progress"),
    ("config", "hooks", "viz"),
    ("weights", "kv_cache", "activation_cache", "tokens", "documents", "bundled"),
    ("model", "adapters", "generation"),
    ("causal_lm", "workers"),
    ("patching", "analysis", "evaluation", "verification", "training", "pool", "sae", "parallel"),
    ("alignment", "steering", "datasets"),
    ("cli", "compat", "harness"),
)
"""Bottom row first. A row may import the rows below it; neighbours in a row never import each other.

Within row 1, `axes`, `arguments` and `optional` stand on `errors`: every module may import the errors it raises.
"""

FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "patching": (
        ("errors",),
        ("pairs", "graph"),
        ("choices",),
        ("results", "mib"),
        ("metrics",),
        ("runs",),
        ("sweeps", "paths"),
        ("circuits",),
        ("estimates", "learned", "baked"),
        ("units",),
        ("studies",),
        ("known",),
    ),
}
"""The same inside a package that has packages of its own."""

HEAVY = frozenset(
    {
        "transformers",
        "pandas",
        "huggingface_hub",
        "tokenizers",
        "tqdm",
        "matplotlib",
        "plotly",
        "peft",
        "yaml",
        "omegaconf",
        "sklearn",
        "accelerate",
        "lm_eval",
        "ray",
    }
)
"""Packages that `import hooklens` must not load: their use goes through `hooklens.optional.import_package`."""

FAMILY_WORD = re.compile(
    r"llama|falcon|neox|gpt-?_?2|gpt-?_?j|gpt-?_?neo|pythia|mi[sx]tral|qwen|gemma|phi-?\d|bloom|xlstm|olmo|starcoder"
    r"|\bmpt\b|stablelm|gpt-?_?bigcode|\bcodegen\b|biogpt|xglm|\bopt\b(?![- ]in)|openai-?_?gpt|dbrx|gpt-?_?oss"
    r"|granite|phi-?moe|nemotron|persimmon|helium|\barcee\b|seed-?_?oss|ernie|\bglm-?_?\d|cohere|apertus|hunyuan"
    r"|nanochat|smollm|exaone|deepseek|moonlight|\bkimi",
    re.IGNORECASE,
)
ALLOWED_PHRASES = re.compile(
    # Examples need a model to load, and only the bundled ones load everywhere.
    r"bundled:tiny-[a-z-]+"
    # The field's own word for one way to stretch rotary frequencies, and the release that brought it.
    r"|(?<![a-zA-Z])llama3(?![0-9])|\bLlama 3\.1\b"
    # A collection of sparse autoencoders, by its name.
    r"|\bGemma Scope\b|\bgemma[_-]scope\b|_gemma_scope\b"
    # Public names that say which library's parameters and configurations they read and write.
    r"|\b(from|to|read|write)_xlstm\b|\bxlstm-jax\b"
    # The field's own word for a way to draw fresh weights.
    r"|\"gpt2\""
)


@dataclass(frozen=True)
class Import:
    """One imported module: where, what, and whether it happens when a function runs."""

    line: int
    target: str
    in_function: bool
    for_types_only: bool


@dataclass(frozen=True)
class Module:
    """A source file under its dotted name."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def part(self) -> str:
        """The entry of `ROWS` this module belongs to; empty for the package's own `__init__`."""
        return [*self.name.split("."), ""][1]

    @property
    def n_code_lines(self) -> int:
        """Lines that are neither blank, nor a comment, nor part of a docstring."""
        in_docstring: set[int] = set()
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                in_docstring.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = enumerate(self.source.splitlines(), start=1)
        return sum(
            1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in in_docstring
        )

    def family_words(self) -> Iterator[tuple[int, str]]:
        """Lines on which a family's name stands in an identifier, a string or a comment, and the name."""
        # Most files have none, wherever in them one looks.
        if FAMILY_WORD.search(self.source) is None:
            return
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            text = ALLOWED_PHRASES.sub("", token.string)
            for match in FAMILY_WORD.finditer(text):
                yield token.start[0], match.group()


class SourceTree:
    """All modules below a package folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules = {module.name: module for module in self._read_modules()}
        self._imports: dict[str, list[Import]] = {}

    def _read_modules(self) -> Iterator[Module]:
        for path in sorted(self.folder.rglob("*.py")):
            parts = [self.folder.name, *path.relative_to(self.folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            yield Module(".".join(parts), path)

    def imports_of(self, module: Module) -> list[Import]:
        """Every import in a module; `from package import name` is the submodule `name` where there is one."""
        if module.name not in self._imports:
            found: list[Import] = []
            self._collect(module.tree, found, in_function=False, for_types_only=False)
            self._imports[module.name] = found
        return self._imports[module.name]

    def _collect(self, node: ast.AST, found: list[Import], *, in_function: bool, for_types_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found += [Import(child.lineno, target, in_function, for_types_only) for target in self._targets(child)]
                continue
            self._collect(
                child,
                found,
                in_function=in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef),
                for_types_only=for_types_only or _is_type_checking(child),
            )

    def _targets(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        origin = "." * node.level + (node.module or "")
        submodules = [f"{origin}.{alias.name}" for alias in node.names]
        return [name if name in self.modules else origin for name in submodules]

    def row_violations(self) -> list[str]:
        """Imports that go up a row, sideways within a row, or to the package itself."""
        row_of = {part: row for row, parts in enumerate(ROWS) for part in parts}
        problems = []
        for module in self.modules.values():
            if module.part and module.part not in row_of:
                problems.append(f"{module.name}: {module.part!r} stands in no row; add it to ROWS and CONTRIBUTING.md")
                continue
            for found in self.imports_of(module):
                place = f"{module.name}:{found.line} imports {found.target}"
                if found.target.startswith("."):
                    problems.append(f"{place}: write the absolute name")
                elif found.target == self.folder.name:
                    problems.append(f"{place}: import the module that defines the name")
                elif found.target in self.modules and module.part:
                    target = self.modules[found.target].part
                    if target in (module.part, "errors"):
                        continue
                    if row_of.get(target, len(ROWS)) >= row_of[module.part]:
                        problems.append(f"{place}: {target} does not stand in a row below {module.part}")
        return problems

    def floor_violations(self, package: str) -> list[str]:
        """The same inside a package: its own `__init__` may import everything."""
        floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms}
        prefix = f"{self.folder.name}.{package}."
        problems = []
        for module in self.modules.values():
            if not module.name.startswith(prefix):
                continue
            room = module.name.removeprefix(prefix).split(".")[0]
            if room not in floor_of:
                problems.append(f"{module.name}: {room!r} stands on no floor; add it to FLOORS")
                continue
            for found in self.imports_of(module):
                if not found.target.startswith(prefix) or found.for_types_only:
                    continue
                target = found.target.removeprefix(prefix).split(".")[0]
                if target not in (room, "errors") and floor_of.get(target, len(floor_of)) >= floor_of[room]:
                    problems.append(f"{module.name}:{found.line}: {target} does not stand on a floor below {room}")
        return problems

    def cycles(self) -> list[list[str]]:
        """Groups of modules that import each other, directly or through others (Tarjan 1972).

        Modules of one room may name each other's types: two classes that are handed to each other belong together.
        """
        graph = {
            name: [
                found.target
                for found in self.imports_of(module)
                if found.target in self.modules
                and not (found.for_types_only and found.target.rpartition(".")[0] == name.rpartition(".")[0])
            ]
            for name, module in self.modules.items()
        }
        return [sorted(group) for group in _strong_components(graph) if len(group) > 1 or group[0] in graph[group[0]]]

    def hidden_imports(self) -> list[str]:
        """Imports inside functions, and calls that import by name outside the one door for them."""
        problems = []
        for module in self.modules.values():
            problems += [
                f"{module.name}:{found.line} imports {found.target} inside a function"
                for found in self.imports_of(module)
                if found.in_function
            ]
            # The discovery of family files and the door itself.
            if module.part == "optional" or module.name.endswith("adapters.families"):
                continue
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call) and _called_name(node) in ("import_module", "__import__"):
                    problems.append(f"{module.name}:{node.lineno} imports by name; use optional.import_package")
                if (
                    isinstance(node, ast.Call)
                    and _called_name(node) == "import_package"
                    and any(
                        isinstance(part, ast.Constant) and str(part.value).split(".")[0] == self.folder.name
                        for part in node.args
                    )
                ):
                    problems.append(f"{module.name}:{node.lineno} hides an import of the package's own module")
        return problems

    def heavy_imports(self) -> list[str]:
        """Heavy packages imported where importing the module loads them."""
        return [
            f"{module.name}:{found.line} imports {found.target} at module level; use optional.import_package"
            for module in self.modules.values()
            for found in self.imports_of(module)
            if found.target.split(".")[0] in HEAVY and not found.for_types_only and not found.in_function
        ]

    def family_words(self) -> list[str]:
        """Family names outside what may know them: `compat` and `arguments.foreign` have the names of others."""
        return [
            f"{module.name}:{line} says {word!r}"
            for module in self.modules.values()
            if module.part not in ("adapters", "bundled", "compat") and module.name != "hooklens.arguments.foreign"
            for line, word in module.family_words()
        ]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _called_name(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _strong_components(graph: dict[str, list[str]]) -> list[list[str]]:
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            cut = stack.index(name)
            components.append(stack[cut:])
            del stack[cut:]

    for name in graph:
        if name not in index:
            visit(name)
    return components
