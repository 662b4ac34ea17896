"""Benchmarks: ratios measured in one process, printed in a table against the bars they are held to.

Run with `python -m pytest tests/benchmarks`. Nothing fails on a slow machine: read the table.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

Record = Callable[..., None]

_ROWS: list[tuple[str, float, str, float | None]] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record(what, value, at_most=... | at_least=...)` adds a row to the table; no bar, no verdict."""

    def add(what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        sign, bar = ("<=", at_most) if at_most is not None else (">=", at_least)
        _ROWS.append((what, value, sign, bar))

    return add


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread, where overhead is what counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is."""
    return str(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not _ROWS:
        return
    terminalreporter.section("figures against their bars")
    width = max(len(what) for what, *_ in _ROWS)
    for what, value, sign, bar in _ROWS:
        if bar is None:
            terminalreporter.line(f"{what:<{width}}  {value:8.3f}")
            continue
        kept = value <= bar if sign == "<=" else value >= bar
        terminalreporter.line(f"{what:<{width}}  {value:8.3f}  {sign} {bar:<6g} {'' if kept else '  MISSED'}")
