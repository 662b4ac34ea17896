"""Writing a file so that a failure half-way leaves the old file or the new one, never a part of one.

The new contents are written into a draft folder beside the target, forced to the disk, and put in the target's place
with one `os.replace`. A file that tensors are mapped from may be its own target: they go on reading the old contents.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.errors import join_names

_DIGEST = "digest"
_UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path to write to; when the block ends the file there takes the place of `path` in one step.

    If the block raises, or the process is killed in it, `path` stays as it was. Drafts that killed processes of this
    host left beside the same target are removed. A link is followed; the mode of a file that is replaced is kept.

    Raises:
        OSError: the draft cannot be written, or `path` is a folder or device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is no regular file, so no file can take its place", str(path))
    folder = make_draft(target)
    try:
        draft = folder / "contents"
        draft.touch()
        mode = stat.S_IMODE((target if target.exists() else draft).stat().st_mode)
        yield draft
        draft.chmod(mode)
        force_to_disk(draft)
        os.replace(draft, target)
        force_folder_to_disk(target.parent)
    finally:
        # Whatever the writer left beside its draft goes, too.
        shutil.rmtree(folder, ignore_errors=True)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file as `replace_file` does, with a digest of its header.

    Args:
        path: the file.
        tensors: any strided tensors; ones that share memory are each written whole, without their autograd history.
        metadata: text by key; the key `"digest"` is taken.

    Raises:
        OSError: the file cannot be written.
        ValueError: tensors without data, or of a kind that the format does not have.
    """
    without_data = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without_data:
        raise ValueError(f"tensors on the meta device hold no data: {join_names(without_data)}")
    owned = _own_memory(tensors)
    written = {**(metadata or {}), _DIGEST: _digest_header(owned, metadata or {})}
    try:
        with replace_file(path) as draft:
            save_file(owned, draft, metadata=written)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except KeyError as error:
        raise ValueError(f"the format has no dtype {error}") from error


def read_safetensors(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; files of other writers have no digest to check.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is damaged, no safetensors file, or cannot be read to the device.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(str(error)) from error
    digest = metadata.pop(_DIGEST, None)
    if digest is not None and digest != _digest_header(tensors, metadata):
        raise ValueError("its header is damaged: names, shapes, dtypes or metadata are not those that were written")
    return tensors, metadata


def _digest_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    described = sorted([name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps([described, sorted(metadata.items())]).encode()).hexdigest()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, and no two in one storage."""
    seen: set[tuple[torch.device, int]] = set()
    owned = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous()
        place = (flat.device, flat.untyped_storage().data_ptr())
        if place in seen or flat.untyped_storage().nbytes() != flat.nbytes:
            flat = flat.clone()
            place = (flat.device, flat.untyped_storage().data_ptr())
        seen.add(place)
        owned[name] = flat
    return owned


def make_draft(target: Path) -> Path:
    """An empty draft folder beside `target`; drafts that killed processes of this host left there are removed.

    Raises:
        OSError: the folder cannot be made.
    """
    _remove_stale_drafts(target)
    folder = target.parent / f"{_draft_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}.draft"
    folder.mkdir()
    return folder


def _draft_prefix(target: Path) -> str:
    """Begins the names of the drafts of one target by processes of this host, however long the target's name is."""
    place = hashlib.sha256(f"{socket.gethostname()}/{target.name}".encode(errors="surrogateescape")).hexdigest()[:16]
    return f".hooklens-{place}-"


def _remove_stale_drafts(target: Path) -> None:
    prefix = _draft_prefix(target)
    for draft in target.parent.glob(f"{prefix}*.draft"):
        process = draft.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not is_running(int(process)):
            shutil.rmtree(draft, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine; where that cannot be asked, there is."""
    # Elsewhere `os.kill` would end the process, not ask for it.
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def force_to_disk(file: Path) -> None:
    """Wait until the contents of a file are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def force_folder_to_disk(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; some file systems cannot, and have changed them all the same.

    Raises:
        OSError: the disk refuses.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _UNSYNCABLE:
                raise
