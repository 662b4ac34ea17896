"""Where a checkpoint's files lie: a folder, the Hugging Face hub, any file system of fsspec, or a `Repository`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooklens.adapters.formats import OldFiles, find_format
from hooklens.adapters.sources.files import CheckpointFiles, LocalFiles
from hooklens.adapters.sources.fsspec_files import FsspecRepository, is_url
from hooklens.adapters.sources.hub import HubFiles, find_local
from hooklens.adapters.sources.repository import Repository, RepositoryFiles
from hooklens.arguments import show
from hooklens.errors import InputError

__all__ = [
    "CheckpointFiles",
    "FsspecRepository",
    "HubFiles",
    "LocalFiles",
    "OldFiles",
    "Repository",
    "RepositoryFiles",
    "open_files",
]


def open_files(
    source: "str | Path | Repository",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointFiles:
    """The files of a checkpoint, none of them read yet.

    Args:
        source: a folder, a name on the hub, an fsspec URL (`"s3://bucket/folder"`), a repository of one's own, or a
            folder or file in an old format of the field.
        revision: branch, tag or commit on the hub.
        subfolder: folder inside the source that holds the checkpoint.
        variant: of several weights in one folder, `"fp16"` for `model.fp16.safetensors`.
        token: for the hub; None: the one that is logged in, False: none.
        cache_dir: where downloads from the hub are kept; None: the hub's own cache.
        local_files_only: take what has been downloaded before and touch no network.
        storage_options: what the file system of a URL is made with (credentials, endpoint).

    Raises:
        CheckpointError: there is no such folder.
        InputError: an option that this kind of source has not.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    if isinstance(source, Repository):
        _refuse({**hub, "storage_options": storage_options}, "a Repository, which knows where it is")
        return RepositoryFiles(source, subfolder=subfolder, variant=variant)
    if isinstance(source, str) and is_url(source):
        _refuse(hub, f"a URL; what the file system of {source!r} takes goes into storage_options")
        return RepositoryFiles(FsspecRepository(source, storage_options), subfolder=subfolder, variant=variant)
    _refuse({"storage_options": storage_options}, "no URL (scheme://...)")
    path = Path(str(source)).expanduser() / (subfolder or "")
    old = find_format(path) if path.exists() else None
    if old is not None:
        _refuse({"variant": variant}, "a checkpoint in an old format, of which there is one")
        return OldFiles(path, old)
    folder = find_local(source)
    if folder is not None:
        return LocalFiles(folder if subfolder is None else folder / subfolder, variant=variant)
    return HubFiles(
        str(source),
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _refuse(given: Mapping[str, object], reason: str) -> None:
    wrong = {name: value for name, value in given.items() if value is not None}
    if wrong:
        listed = ", ".join(f"{name}={show(value)}" for name, value in wrong.items() if name != "token")
        raise InputError(f"{listed or 'token'} does not go with this source: it is {reason}. Leave it out")
