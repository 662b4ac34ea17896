"""A JSON Lines file of results that survives interruptions: one line per item, written when it is scored.

Beside `results.jsonl` stands `results.jsonl.run.json`, which says what run the lines belong to. A run that finds both
goes on where the lines end; a line that was cut off half-way is dropped and scored again. While a run writes it holds
the lock of `results.jsonl.lock`, which the system opens when the process ends, however it ends; the empty file stays.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from hooklens.arguments import read_path, show
from hooklens.errors import InputError, join_names
from hooklens.files import replace_file

_FORMAT = "hooklens-results-2"
_FUNCTIONS = "functions"
_WAY_OUT = "choose another file, or delete it to start anew"


class ResultsFile:
    """Results by id, appended to a file.

    Args:
        path: the file, made if it does not exist; its folder must.
        run: what the results depend on (hashes of model and prefix, say). `"functions"`, a list, names what acts in
            the run and cannot be compared; while there is any the file must be a new one.

    Attributes:
        done: the items in the file, by id, and a hash of each item's content.

    Raises:
        InputError: another process writes the file, it holds results of another run or lines that are no results, or
            it cannot be read or written.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = read_path(path, what="the file of results")
        self.run = {"format": _FORMAT, _FUNCTIONS: [], **run}
        self.done: dict[str, str] = {}
        self._file: BinaryIO | None = None
        if not self.path.name:
            raise InputError(f"cannot write results to {str(self.path)!r}: it is a folder; give the name of a file")
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))

    @property
    def run_path(self) -> Path:
        """The file that says what run the results belong to."""
        return self.path.with_name(self.path.name + ".run.json")

    def __enter__(self) -> "ResultsFile":
        if not self.path.parent.is_dir():
            raise InputError(f"cannot write results to {self.path}: the folder {self.path.parent} does not exist")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"cannot write results to {self.path}: it is no regular file")
        with contextlib.ExitStack() as on_failure, self._told_in_words():
            self._acquire_lock()
            on_failure.callback(self._lock.release)
            if self.path.exists() and self.path.stat().st_size > 0:
                self._check_run()
                self._read_done()
            else:
                self._write_run()
            self._file = self.path.open("ab")
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        # Closing tries once more to write what did not go onto a full disk, of which the error in progress tells.
        ignored = contextlib.suppress(InputError) if kind is not None else contextlib.nullcontext()
        try:
            with ignored, self._told_in_words():
                if file is not None:
                    file.close()
        finally:
            self._lock.release()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, each with `id` and `item`, one line each, and see that they reach the disk.

        Raises:
            InputError: they cannot be written, to a full disk for instance; what was written before is kept.
        """
        assert self._file is not None
        records = list(records)
        lines = [json.dumps(_as_json(record), allow_nan=False).encode() + b"\n" for record in records]
        with self._told_in_words():
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done.update({record["id"]: record["item"] for record in records})

    def _acquire_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is writing results to {self.path}; wait until it has finished, or choose another file"
            ) from None

    @contextlib.contextmanager
    def _told_in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.path
            raise InputError(f"cannot use {self.path} for results: {place}: {error.strerror or error}") from error

    def _write_run(self) -> None:
        with replace_file(self.run_path) as draft:
            draft.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")

    def _check_run(self) -> None:
        try:
            found = json.loads(self.run_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{self.path} is not empty, and {self.run_path} is missing: {_WAY_OUT}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.run_path} is damaged, for it is not JSON ({error}): {_WAY_OUT}") from error
        if not isinstance(found, dict):
            raise InputError(
                f"{self.run_path} is damaged: it holds a JSON {type(found).__name__}, expected an object: {_WAY_OUT}"
            )
        differing = [
            f"{key} is {show(found.get(key))} there and {show(self.run.get(key))} in this run"
            for key in sorted(self.run.keys() | found.keys())
            if key != _FUNCTIONS and found.get(key) != self.run.get(key)
        ]
        if differing:
            raise InputError(f"{self.path} holds the results of another run: {'; '.join(differing)}. {_WAY_OUT}")
        self._refuse_functions(found.get(_FUNCTIONS))

    def _refuse_functions(self, there: object) -> None:
        """Refuse to go on where functions act or acted."""
        for acting, which in ((there, "in the run they are from"), (self.run[_FUNCTIONS], "in this run")):
            if acting:
                names = (
                    join_names([str(name) for name in acting], limit=5) if isinstance(acting, list) else show(acting)
                )
                raise InputError(
                    f"{self.path} holds results, and functions act on the model {which}: {names}. Whether they do the "
                    f"same in both cannot be told: {_WAY_OUT}. Edits as values (edits=) can be compared"
                )

    def _read_done(self) -> None:
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
            try:
                record_id, item = _read_identity(line)
                if record_id in self.done:
                    raise ValueError(f"the id {show(record_id)} has a result before it")
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{self.path}, line {number}: is no result ({error}); remove it to score its item anew"
                ) from error
            self.done[record_id] = item
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
                os.fsync(file.fileno())


def _read_identity(line: bytes) -> tuple[str, str]:
    """The id of a result and the hash of its item.

    Raises:
        ValueError: it has none.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    for key in ("id", "item"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{key!r} is {show(record.get(key))}, expected a text")
    return record["id"], record["item"]


def _as_json(value: Any) -> Any:
    """The value with numbers that JSON does not have (NaN, infinities) as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return value
