"""A JSON Lines file of results that survives interruptions: one line per item, written when it is scored.

Beside `results.jsonl` stands `results.jsonl.run.json`, which says what run the lines belong to. A run that
finds both goes on where the lines end; a line that was cut off half-way is dropped and scored again.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hooklens.errors import InputError

_FORMAT = "hooklens-results-1"


class ResultsFile:
    """Results by id, appended to a file.

    Args:
        path: the file, made if it does not exist; its folder must.
        run: what the results depend on (hashes of model and prefix, say).

    Attributes:
        done: the items in the file, by id, and a hash of each item's content.

    Raises:
        InputError: the file holds results of another run, or is no file of results.
    """

    def __init__(self, path: str | Path, run: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.run = {"format": _FORMAT, **run}
        self.done: dict[str, str] = {}
        self._file: BinaryIO | None = None

    @property
    def run_path(self) -> Path:
        """The file that says what run the results belong to."""
        return self.path.with_name(self.path.name + ".run.json")

    def __enter__(self) -> "ResultsFile":
        if not self.path.parent.is_dir():
            raise InputError(f"cannot write results to {self.path}: the folder {self.path.parent} does not exist")
        if self.path.exists() and self.path.stat().st_size > 0:
            self._check_run()
            self._read_done()
        else:
            self._write_run()
        self._file = self.path.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, each with `id` and `item`, one line each, and see that they reach the disk."""
        assert self._file is not None
        for record in records:
            self._file.write(json.dumps(_as_json(record), allow_nan=False).encode() + b"\n")
            self._file.flush()
            self.done[record["id"]] = record["item"]
        os.fsync(self._file.fileno())

    def _write_run(self) -> None:
        # Put in place whole, so that it is never found half-written.
        draft = self.run_path.with_name(self.run_path.name + ".part")
        draft.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.run_path)

    def _check_run(self) -> None:
        way_out = "choose another file, or delete it to start anew"
        try:
            found = json.loads(self.run_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{self.path} is not empty, and {self.run_path} is missing: {way_out}") from None
        except ValueError as error:
            raise InputError(f"{self.run_path} is not JSON ({error}): {way_out}") from error
        there = found if isinstance(found, dict) else {}
        differing = [
            f"{key} is {there.get(key)!r} there and {self.run.get(key)!r} in this run"
            for key in sorted(self.run.keys() | there.keys())
            if there.get(key) != self.run.get(key)
        ]
        if differing:
            raise InputError(f"{self.path} holds the results of another run: {'; '.join(differing)}. {way_out}")

    def _read_done(self) -> None:
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.done[record["id"]] = record["item"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {number}: is no result ({error!r}); remove it to score its item anew"
                ) from error
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))


def _as_json(value: Any) -> Any:
    """The value with numbers that JSON does not have (NaN, infinities) as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return value
