"""Where a checkpoint's files lie: a folder, the Hugging Face hub, any file system of fsspec, or a `Repository`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hooklens.adapters.files.disk import read_json
from hooklens.adapters.formats import EARLIER, SUFFIXES, OldFiles, find_format
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
    """The files of a checkpoint: none of them read yet but what tells a format, the config of a hub name say.

    Args:
        source: a folder, a name on the hub, an fsspec URL (`"s3://bucket/folder"`), a repository of one's own, or the
            path or URL of a file in an old format of the field.
        revision: branch, tag or commit on the hub.
        subfolder: folder inside the source that holds the checkpoint, or file there in an old format.
        variant: of several weights in one folder, `"fp16"` for `model.fp16.safetensors`; of TransformerLens's own
            checkpoints the number of steps or tokens that their names end with.
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
        return _open_listed(
            lambda inside: RepositoryFiles(source, subfolder=inside, variant=variant), subfolder, variant
        )
    if isinstance(source, str) and is_url(source):
        _refuse(hub, f"a URL; what the file system of {source!r} takes goes into storage_options")
        return _open_url(source, storage_options, subfolder=subfolder, variant=variant)
    _refuse({"storage_options": storage_options}, "no URL (scheme://...)")
    path = Path(str(source)).expanduser() / (subfolder or "")
    old = _find_on_disk(path, variant) if path.exists() else None
    if old is not None:
        return old
    folder = find_local(source)
    if folder is not None:
        return LocalFiles(folder if subfolder is None else folder / subfolder, variant=variant)

    def open_hub(inside: str) -> HubFiles:
        return HubFiles(
            str(source),
            revision=revision,
            subfolder=inside,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    return _open_listed(open_hub, subfolder, variant)


def _find_on_disk(path: Path, variant: str | None) -> OldFiles | None:
    """What is in an old format at a path on this machine."""
    if path.is_dir():
        old = find_format(LocalFiles(path), variant=variant)
    else:
        folder = path.parent
        above = partial(LocalFiles, folder.parent) if folder.name == EARLIER else None
        old = find_format(LocalFiles(folder), file=path.name, variant=variant, above=above)
    return None if old is None else OldFiles(old)


def _open_url(
    url: str, storage_options: Mapping[str, Any] | None, *, subfolder: str | None, variant: str | None
) -> CheckpointFiles:
    """The files at a URL, of a folder or of a file in an old format."""
    scheme, _, path = url.rpartition("://")
    folder, _, file = path.rpartition("/")
    if subfolder is None and folder and file.endswith(SUFFIXES):
        # Everything is said from the folder that holds `checkpoints` on, where there is such a one.
        parent, _, last = folder.rpartition("/")
        folder, subfolder = (parent, f"{last}/{file}") if parent and last == EARLIER else (folder, file)
        url = f"{scheme}://{folder}"
    repository = FsspecRepository(url, storage_options)
    return _open_listed(
        lambda inside: RepositoryFiles(repository, subfolder=inside, variant=variant), subfolder, variant
    )


def _open_listed(
    open_at: Callable[[str], RepositoryFiles | HubFiles], inside: str | None, variant: str | None
) -> CheckpointFiles:
    """The files in a folder that is not on this machine, or of a file there in an old format.

    Args:
        open_at: gives the files of a folder inside.
        inside: the folder, or the file.
        variant: of several weights, which.
    """
    folder, file = (inside or "").strip("/"), None
    if folder.endswith(SUFFIXES):
        folder, _, file = folder.rpartition("/")
    files = open_at(folder)
    if isinstance(files, HubFiles) and file is None and _is_of_the_hub(files):
        return files
    parent, _, last = folder.rpartition("/")
    above = partial(open_at, parent) if file is not None and last == EARLIER else None
    old = find_format(files, file=file, variant=variant, above=above)
    return files if old is None else OldFiles(old)


def _is_of_the_hub(files: HubFiles) -> bool:
    """Whether a config is in the hub's words; files need not be listed then."""
    path = files.config_folder() / "config.json"
    return path.is_file() and not {"model_type", "architectures"}.isdisjoint(read_json(path))


def _refuse(given: Mapping[str, object], reason: str) -> None:
    wrong = {name: value for name, value in given.items() if value is not None}
    if wrong:
        listed = ", ".join(f"{name}={show(value)}" for name, value in wrong.items() if name != "token")
        raise InputError(f"{listed or 'token'} does not go with this source: it is {reason}. Leave it out")
