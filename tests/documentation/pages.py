"""What the pages of the documentation show is run: each page in a process of its own, its blocks one after another.

A block of Python is run as it stands, with the names that the blocks before it have made. A line
`print(...)  # text` has to print that text; where the text is a number, within rounding to the decimals shown. A block
of another language with a title (```yaml title="pool.yaml") is a file that lies in the working folder. A block behind
a line `<!-- not run: reason -->` is not run, and a page's text may quote what its code computes (`tests/quotes.py`).

Processes are copies of one that has imported the package and computed nothing, so a page costs what its code costs.
"""

import ast
import contextlib
import io
import linecache
import multiprocessing
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.quotes import QUOTE, agrees

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)(?: title=\"(?P<title>[^\"\n]+)\")?\n"
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_PRINTS = re.compile(r"^print\(.*\)  # (?P<text>.+)$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code of a page.

    Attributes:
        language: what stands behind the fence.
        code: the text.
        line: of the page, on which the code begins.
        title: the file that it is; None: none.
        not_run: why it is not run; None: it is.
    """

    language: str
    code: str
    line: int
    title: str | None = None
    not_run: str | None = None


@dataclass(frozen=True)
class Ran:
    """What running a page came to.

    Attributes:
        problems: what is not as the page says.
        raised: the class names of the error that ended it and of the classes that this derives from; empty: none.
        message: of that error.
        at_block: the block in which it was raised.
    """

    problems: list[str] = field(default_factory=list)
    raised: tuple[str, ...] = ()
    message: str = ""
    at_block: int = -1


def read_blocks(text: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    return [
        Block(
            language=match["language"],
            code=match["code"],
            line=text.count("\n", 0, match.start("code")) + 1,
            title=match["title"],
            not_run=match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def run_page(path: Path, *, warnings_raise: bool = False) -> Ran:
    """Run a page's blocks in a fresh process.

    Args:
        path: the page.
        warnings_raise: the warnings of the package end it, as errors.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.documentation.preloaded"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run_alone, args=(path, there, warnings_raise))
    process.start()
    there.close()
    try:
        ran: Ran = here.recv()
    except EOFError:
        ran = Ran([f"{path.name}: the process died"])
    process.join()
    return ran


def _run_alone(path: Path, connection: Connection, warnings_raise: bool) -> None:
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with warnings.catch_warnings():
            if warnings_raise:
                warnings.filterwarnings("error", category=UserWarning, module="page")
            connection.send(run_text(text, path.name))
        # A folder that is somebody's working folder cannot be removed everywhere.
        os.chdir(ROOT)


def run_text(text: str, name: str) -> Ran:
    """Run the blocks of a page in this process."""
    blocks = read_blocks(text)
    for block in blocks:
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    problems: list[str] = []
    for number, block in enumerate(blocks):
        if block.language != "python" or block.not_run is not None or block.title is not None:
            continue
        try:
            problems += _run_block(block, names, name)
        except BaseException as error:
            where = f"{name}:{block.line}: the block that begins here"
            told = "".join(traceback.format_exception(error))
            kinds = tuple(kind.__name__ for kind in type(error).__mro__)
            return Ran([*problems, f"{where} raised:\n{told}"], kinds, str(error), number)
    for match in QUOTE.finditer(text):
        if not agrees(match["text"], names.get(match["name"])):
            problems.append(f"{name}: quotes {match['name']} as {match['text']}; it is {names.get(match['name'])!r}")
    return Ran(problems)


def _run_block(block: Block, names: dict[str, Any], name: str) -> list[str]:
    """Run a block, statement by statement, and compare what its lines print with what they say."""
    source = "\n" * (block.line - 1) + block.code
    file = f"{name}:{block.line}"
    # So that tracebacks, and what reads its own source, find the lines.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    lines, problems = source.splitlines(), []
    for statement in ast.parse(source, file).body:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(ast.Module([statement], []), file, "exec"), names)
        says = _PRINTS.match(lines[(statement.end_lineno or statement.lineno) - 1])
        if says is not None and not _is_what_was_said(says["text"], printed.getvalue().removesuffix("\n")):
            problems.append(f"{name}:{statement.lineno}: says it prints {says['text']!r}; it is {printed.getvalue()!r}")
    return problems


def _is_what_was_said(text: str, printed: str) -> bool:
    if text == printed:
        return True
    try:
        return "." in text and agrees(text, float(printed))
    except (ValueError, ArithmeticError):
        return False


def pages(*, of_errors: bool) -> Sequence[Path]:
    """The pages with code, those of errors or the others, the README among them."""
    errors = sorted((DOCS / "errors").glob("[A-Z]*.md"))
    if of_errors:
        return errors
    others = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [path for path in others if path not in errors and "```python" in path.read_text(encoding="utf-8")]
