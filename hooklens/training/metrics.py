"""Metrics of a run: to a JSON Lines file, to a logger, and kept."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hooklens.arguments import is_function, refusal
from hooklens.errors import InputError
from hooklens.files import replace_file

Record = dict[str, float]
Log = Callable[[dict[str, float], int], object]


def read_logger(given: object) -> Log | None:
    """A logger as a function of metrics and step: of `given.log(metrics, step=step)`, or of `given(metrics, step)`.

    Raises:
        InputError: it is neither.
    """
    if given is None:
        return None
    log: Any = getattr(given, "log", None)
    if is_function(log) and not isinstance(given, type):
        return lambda metrics, step: log(metrics, step=step)
    if is_function(given):
        return given
    raise refusal(given, "logger", "an object with .log(metrics, step=...), or a function of metrics and step")


class MetricsLog:
    """The metrics of a run.

    Args:
        path: a JSON Lines file, appended to; None: none.
        log: also gets every entry.
        step: where the run goes on; entries of the file that are later, of a process that was killed, are dropped.

    Attributes:
        records: all entries, in order.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, log: Log | None, *, step: int) -> None:
        self.records: list[Record] = []
        self._path, self._log = path, log
        if path is not None:
            with _told(path):
                self._take_up(path, step)

    def _take_up(self, path: Path, step: int) -> None:
        kept = []
        # The last line of a killed process may be part of one.
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and record.get("step", step + 1) <= step:
                kept.append(line)
                self.records.append(record)
        with replace_file(path) as draft:
            draft.write_text("".join(kept), encoding="utf-8")

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an entry."""
        record = {"step": step, **metrics}
        self.records.append(record)
        if self._path is not None:
            with _told(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._log is not None:
            self._log(dict(metrics), step)

    def force_to_disk(self) -> None:
        """Wait until the entries are on the disk."""
        if self._path is not None:
            with _told(self._path), self._path.open("rb+") as file:
                os.fsync(file.fileno())


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the file system refuses, in words."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot use {path} for metrics: {error.strerror or error}") from error
