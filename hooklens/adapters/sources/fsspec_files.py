"""Checkpoints on any file system that fsspec reaches: `s3://`, `gs://`, `memory://`, `hf://`, `sftp://`, ..."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from hooklens.errors import CheckpointError, MissingDependencyError
from hooklens.optional import import_package

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://.*")


def is_url(source: str) -> bool:
    """Whether it names a file system: `scheme://...`."""
    return _URL.fullmatch(source) is not None


def open_file_system(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL's folder on it.

    Raises:
        MissingDependencyError: the package of that file system is not installed.
        CheckpointError: there is no such kind of file system, or it cannot be reached.
    """
    core = import_package("fsspec.core")
    try:
        files, root = core.url_to_fs(url, **(storage_options or {}))
    except ImportError as error:
        raise MissingDependencyError(f"{url}: {error}") from error
    except Exception as error:
        # Any file system, with errors of its own.
        raise CheckpointError(
            f"{url}: cannot be opened ({type(error).__name__}: {error}); check the address and storage_options"
        ) from error
    return files, root.rstrip("/")


class FsspecRepository:
    """A folder on a file system of fsspec, as a `Repository`.

    Args:
        url: the folder.
        storage_options: what the file system is made with (credentials, endpoint); see fsspec and the package of the
            file system (`s3fs`, `gcsfs`, ...).

    Raises:
        MissingDependencyError: the package of that file system is not installed.
        CheckpointError: there is no such kind of file system, or it cannot be reached.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._files, self._root = open_file_system(url, storage_options)

    def __str__(self) -> str:
        return self._url

    def names(self) -> Collection[str]:
        """The names of all files below the folder.

        Raises:
            CheckpointError: there is no such folder, or it cannot be reached.
        """
        try:
            paths = self._files.find(self._root)
        except Exception as error:
            raise self._unreadable(error) from error
        found = [path.removeprefix(self._root).lstrip("/") for path in paths]
        if not [name for name in found if name]:
            raise CheckpointError(f"{self._url}: no such folder, or nothing in it; expected config.json and weights")
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from `start` to before `stop`.

        Raises:
            CheckpointError: the file is not there, or cannot be read.
        """
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{name}", start=start, end=stop)
        except Exception as error:
            raise self._unreadable(error, f"/{name}") from error
        return content

    def _unreadable(self, error: Exception, name: str = "") -> CheckpointError:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        return CheckpointError(f"{self._url}{name}: cannot be read ({found})")
