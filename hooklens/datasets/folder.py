"""The folder of a data set, on this machine or on a file system that fsspec reaches, behind one set of methods."""

import hashlib
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from hooklens.adapters.sources.fsspec_files import is_url, open_file_system
from hooklens.arguments import read_path, require
from hooklens.errors import CheckpointError, InputError
from hooklens.files import replace_file, write_safetensors

LOCK = "recording.lock"
_LEFT_IN_PLACE = 8
"""Files of another machine that are kept here at a time, where nobody said where to keep them."""


class Folder(ABC):
    """Where a data set lies. All methods raise an `OSError` for what the file system refuses."""

    @abstractmethod
    def __str__(self) -> str:
        """Its path or URL."""

    @abstractmethod
    def make(self) -> None:
        """Make it, if it is not there; its parent is.

        Raises:
            CheckpointError: something else is there.
        """

    @abstractmethod
    def lock(self) -> FileLock:
        """What one who writes there holds, so that no other on this machine does."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the files in it, but for the lock."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The contents of a small file."""

    @abstractmethod
    def write(self, name: str, contents: bytes) -> None:
        """Write a small file that no other process is writing, whole or not at all."""

    @abstractmethod
    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a file of tensors, and give its SHA-256. It may be there in part until this returns."""

    @abstractmethod
    def fetch(self, name: str, checksum: str) -> Path:
        """A file as one on this machine, to map into memory; its SHA-256 tells it from others of its name."""


class LocalFolder(Folder):
    """A folder on this machine.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def absolute(self) -> "LocalFolder":
        """The same folder, for processes that work elsewhere."""
        return LocalFolder(self._path.absolute())

    def make(self) -> None:
        """Make it, if it is not there."""
        if not self._path.exists():
            self._path.mkdir()
        elif not self._path.is_dir():
            raise CheckpointError(f"cannot record into {self}: it is no folder")

    def lock(self) -> FileLock:
        """A lock on this machine."""
        return FileLock(self._path / LOCK)

    def names(self) -> list[str]:
        """The names of its files."""
        return sorted(path.name for path in self._path.iterdir() if path.name != LOCK)

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        return (self._path / name).read_bytes()

    def write(self, name: str, contents: bytes) -> None:
        """Write a small file."""
        with replace_file(self._path / name) as draft:
            draft.write_bytes(contents)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a file of tensors, and give its SHA-256."""
        write_safetensors(self._path / name, tensors)
        return hash_file(self._path / name)

    def fetch(self, name: str, checksum: str) -> Path:
        """A file as one on this machine."""
        return self._path / name


class RemoteFolder(Folder):
    """A folder at a URL.

    A file is put together here and then uploaded. No lock holds for other machines, so each time before a file is
    written anew it is compared with what was last read or written there.

    Args:
        url: the folder.
        storage_options: what the file system is made with.
        cache_dir: where files that are read are kept; None: a folder that goes with this object, with the files that
            were read last.

    Raises:
        CheckpointError: there is no such kind of file system, or it cannot be reached.
        MissingDependencyError: the package of that file system is not installed.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None, cache_dir: Path | None) -> None:
        self._url, self._options, self._cache_dir = url.rstrip("/"), dict(storage_options or {}), cache_dir
        self._seen: dict[str, bytes | None] = {}
        self._open()

    def _open(self) -> None:
        self._files, self._root = open_file_system(self._url, self._options)
        self._fetched: OrderedDict[Path, None] = OrderedDict()
        self._here = self._cache_dir or Path(tempfile.mkdtemp(prefix="hooklens-"))
        if self._cache_dir is None:
            weakref.finalize(self, shutil.rmtree, self._here, ignore_errors=True)

    def __str__(self) -> str:
        return self._url

    def __getstate__(self) -> dict[str, Any]:
        """What other processes open anew."""
        return {name: self.__dict__[name] for name in ("_url", "_options", "_cache_dir", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._open()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever the file system raises, as an `OSError`."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def make(self) -> None:
        """Make it, if it is not there."""
        with self._told():
            if self._files.isfile(self._root):
                raise CheckpointError(f"cannot record into {self}: it is no folder")
            self._files.makedirs(self._root, exist_ok=True)

    def lock(self) -> FileLock:
        """A lock on this machine."""
        name = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        return FileLock(Path(tempfile.gettempdir()) / f"hooklens-{name}.lock")

    def names(self) -> list[str]:
        """The names of its files."""
        with self._told():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                # Where files have no folders but names alone (S3), one without files is not there.
                found = []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        with self._told():
            contents: bytes = self._files.cat_file(f"{self._root}/{name}")
        self._seen[name] = contents
        return contents

    def write(self, name: str, contents: bytes) -> None:
        """Write a small file."""
        before = self._seen.get(name)
        try:
            now = self.read(name)
        except FileNotFoundError:
            now = None
        if now != before:
            raise OSError(f"{name} was changed by another process, which records there, too")
        with self._told():
            self._files.pipe_file(f"{self._root}/{name}", contents)
        self._seen[name] = contents

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a file of tensors, and give its SHA-256."""
        draft = self._here / f"{name}.draft"
        try:
            self._here.mkdir(parents=True, exist_ok=True)
            write_safetensors(draft, tensors)
            with self._told():
                self._files.put_file(str(draft), f"{self._root}/{name}")
            return hash_file(draft)
        finally:
            draft.unlink(missing_ok=True)

    def fetch(self, name: str, checksum: str) -> Path:
        """A file as one on this machine."""
        # Other data sets may keep files there, and one that was recorded anew has other files of the same names.
        path = self._here / f"{checksum[:32]}-{name}"
        if path not in self._fetched and not (self._cache_dir is not None and path.is_file()):
            self._here.mkdir(parents=True, exist_ok=True)
            with self._told(), replace_file(path) as draft:
                self._files.get_file(f"{self._root}/{name}", str(draft))
        self._fetched[path] = None
        self._fetched.move_to_end(path)
        while self._cache_dir is None and len(self._fetched) > _LEFT_IN_PLACE:
            # What is mapped from it stays readable.
            oldest, _ = self._fetched.popitem(last=False)
            oldest.unlink(missing_ok=True)
        return path


def open_folder(
    given: object,
    *,
    what: str,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: object = None,
) -> Folder:
    """The folder at a path or URL.

    Args:
        given: a path, or `scheme://...`.
        what: the argument, for messages.
        storage_options: for a URL.
        cache_dir: for a URL, see `RemoteFolder`.

    Raises:
        InputError: neither a path nor a URL, or options that only URLs have.
        CheckpointError, MissingDependencyError: as for `RemoteFolder`.
    """
    if isinstance(given, str) and is_url(given):
        if storage_options is not None:
            expected = "what the file system is made with, by name"
            require(storage_options, kind=Mapping, what="storage_options", expected=expected)
        kept_in = None if cache_dir is None else read_path(cache_dir, what="cache_dir")
        return RemoteFolder(given, storage_options, kept_in)
    path = read_path(given, what=what)
    for name, option in (("storage_options", storage_options), ("cache_dir", cache_dir)):
        if option is not None:
            raise InputError(f"{name} is for a URL (scheme://...), and {what} is the path {str(path)!r}; leave it out")
    return LocalFolder(path)


@contextmanager
def hold(folder: Folder) -> Iterator[None]:
    """Be the only one on this machine that writes there.

    Raises:
        CheckpointError: another process is.
    """
    lock = folder.lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another process is recording into {folder}; wait until it has finished, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()
