"""Shards on their way to the disk, written by a thread of their own while the model runs on."""

import contextlib
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType

from torch import Tensor

from hooklens.datasets.folder import Folder, hold
from hooklens.datasets.manifest import NAME, Manifest, Shard, name_shard
from hooklens.errors import CheckpointError


@dataclass(frozen=True, eq=False, kw_only=True)
class Filled:
    """What a shard is to hold.

    Attributes:
        tensors: by name, `[token, ...]`.
        documents, tokens_read, digest: as of a `Shard`.
    """

    tensors: Mapping[str, Tensor]
    documents: int
    tokens_read: int
    digest: str


class ShardWriter:
    """Writes shards into a folder, one at a time; one more may wait, so that memory stays what it is.

    Args:
        folder: the folder, made if it is not there; its parent must be.
        wanted: what is to be recorded; `shards` are empty.

    Attributes:
        manifest: what the folder holds.

    Raises:
        CheckpointError: the folder cannot be used, holds something else, or another process writes there.
    """

    def __init__(self, folder: Folder, wanted: Manifest) -> None:
        self.folder = folder
        self._queue: queue.Queue[Filled | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="hooklens shards", daemon=True)
        with contextlib.ExitStack() as held:
            try:
                folder.make()
                held.enter_context(hold(folder))
                self.manifest = self._find(wanted)
            except OSError as error:
                raise CheckpointError(f"cannot record into {folder}: {error}") from error
            self._held = held.pop_all()

    def _find(self, wanted: Manifest) -> Manifest:
        """The manifest that is there, of the same recording; or a new one."""
        names = self.folder.names()
        if NAME in names:
            found = Manifest.read(self.folder)
            found.check_same(wanted, self.folder)
            return found
        if names:
            raise CheckpointError(
                f"cannot record into {self.folder}: it is no activation data set, and it holds {names[:5]}; choose a "
                "new or an empty folder"
            )
        wanted.write(self.folder)
        return wanted

    def __enter__(self) -> "ShardWriter":
        self._thread.start()
        return self

    def put(self, filled: Filled) -> None:
        """Hand a shard over; waits while one is waiting.

        Raises:
            CheckpointError: an earlier one could not be written; what was written before is kept.
        """
        self._check()
        while True:
            try:
                return self._queue.put(filled, timeout=0.5)
            except queue.Full:
                self._check()

    def finish(self) -> None:
        """Wait until all is written, and say that the set is complete.

        Raises:
            CheckpointError: something could not be written.
        """
        self._stop()
        self._check()
        try:
            complete = replace(self.manifest, complete=True)
            complete.write(self.folder)
            self.manifest = complete
        except OSError as error:
            raise CheckpointError(self.tell(error)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        finally:
            self._held.close()

    def _stop(self) -> None:
        if not self._thread.is_alive():
            return
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.5)
                break
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise CheckpointError(self.tell(self._error)) from self._error

    def tell(self, error: BaseException) -> str:
        """In words, that something could not be written, and what is kept."""
        kept = f"{len(self.manifest.shards)} shards with {self.manifest.n_tokens:,} tokens are kept"
        return (
            f"cannot write to {self.folder}: {getattr(error, 'strerror', None) or error}; {kept}. Make room and record "
            "again with the same arguments to go on"
        )

    def _work(self) -> None:
        try:
            while (filled := self._queue.get()) is not None:
                self._write(filled)
        except BaseException as error:
            self._error = error

    def _write(self, filled: Filled) -> None:
        name = name_shard(len(self.manifest.shards))
        checksum = self.folder.write_tensors(name, filled.tensors)
        shard = Shard(
            name=name,
            tokens=len(filled.tensors["tokens"]),
            documents=filled.documents,
            tokens_read=filled.tokens_read,
            digest=filled.digest,
            sha256=checksum,
        )
        self.add(shard)

    def add(self, shard: Shard) -> None:
        """Say in the manifest that one more shard lies there.

        Raises:
            OSError: the manifest cannot be written.
        """
        longer = self.manifest.with_shard(shard)
        longer.write(self.folder)
        self.manifest = longer
