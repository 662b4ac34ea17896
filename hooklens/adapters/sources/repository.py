"""Checkpoints in places that are no folder: files read by name and range, tensor by tensor.

Nothing is copied to the disk but the small files beside the weights, and weights in PyTorch's own format, which cannot
be read in parts.
"""

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.files.disk import DTYPES, HEADER_DIGEST, DiskTensors, TensorHeader, digest_headers, weight_file
from hooklens.adapters.sources.files import COMPANIONS
from hooklens.arguments import show
from hooklens.errors import CheckpointError, join_names

# More than any file of a checkpoint needs.
_LONGEST_HEADER = 100 * 2**20


@runtime_checkable
class Repository(Protocol):
    """Where a checkpoint lies that is neither a folder, nor on the hub, nor anywhere that fsspec reaches.

    A class with these two methods is one; `str(repository)` is its name in texts of errors. What the methods raise as
    `OSError` becomes a `CheckpointError`.
    """

    def names(self) -> Collection[str]:
        """The names of all files, with `/` between folders."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from `start` to before `stop`; None: to its end."""
        ...


class RepositoryFiles:
    """The files of a checkpoint in a repository.

    Args:
        repository: where.
        subfolder: folder inside of it that holds the checkpoint.
        variant: of several weights in one folder, which.
    """

    def __init__(self, repository: Repository, *, subfolder: str | None = None, variant: str | None = None) -> None:
        self._repository, self._variant = repository, variant
        self._prefix = "" if not subfolder else subfolder.strip("/") + "/"
        # Removed with this object.
        self._copies = tempfile.TemporaryDirectory(prefix="hooklens-")
        self._names: list[str] | None = None

    @property
    def where(self) -> str:
        """The repository's own name, and the folder inside."""
        return f"{self._repository}{'/' + self._prefix.rstrip('/') if self._prefix else ''}"

    def config_folder(self) -> Path:
        """A temporary folder with a copy of `config.json`."""
        return self._copy(["config.json"])

    def folder(self) -> Path:
        """A temporary folder with copies of all but the weights.

        Raises:
            CheckpointError: there is no `config.json`, or a file cannot be read.
        """
        listing = self._listing()
        if not {"config.json", "adapter_config.json"} & set(listing):
            found = join_names(sorted(listing)[:20]) or "nothing"
            raise CheckpointError(f"{self.where}: holds no config.json; expected that and weights, found {found}")
        return self.companions()

    def names(self) -> Collection[str]:
        """The names of all files."""
        return self._listing()

    def fetch(self, names: Collection[str]) -> Path:
        """A temporary folder with copies of these files."""
        return self._copy(names)

    def companions(self) -> Path:
        """A temporary folder with copies of what stands beside the weights."""
        return self._copy([name for name in self._listing() if any(fnmatch(name, one) for one in COMPANIONS)])

    def weights(self) -> TensorSource:
        """The tensors, each read when it is asked for; pickles are copied first, whole.

        Raises:
            CheckpointError: there are no weights, or their files cannot be read.
        """
        listing = self._listing()
        for name in ("model.safetensors", "pytorch_model.bin"):
            whole, index = weight_file(name, self._variant), weight_file(f"{name}.index.json", self._variant)
            files = [whole] if whole in listing else self._files_of(index) if index in listing else []
            missing = sorted(set(files) - set(listing))
            if missing:
                raise CheckpointError(f"{self.where}: {index} names files that are not there: {join_names(missing)}")
            if files and whole.endswith(".safetensors"):
                return RangedTensors(self._read, files, where=self.where)
            if files:
                self._copy([*files, *([index] if index in listing else [])])
                return DiskTensors(Path(self._copies.name), variant=self._variant)
        found = join_names(sorted(listing)[:20]) or "nothing"
        raise CheckpointError(
            f"{self.where}: holds no weights; expected model.safetensors or pytorch_model.bin, whole or with an index, "
            f"found {found}"
        )

    def _listing(self) -> list[str]:
        if self._names is None:
            try:
                found = self._repository.names()
            except OSError as error:
                raise CheckpointError(f"{self.where}: cannot be listed ({error}); check the address") from error
            self._names = [name.removeprefix(self._prefix) for name in found if name.startswith(self._prefix)]
        return self._names

    def _files_of(self, index: str) -> list[str]:
        try:
            weight_map = json.loads(self._read(index))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.where}/{index}: is no index of weights ({error}); upload it again") from error
        if not all(isinstance(file, str) and "/" not in file for file in files):
            raise CheckpointError(f"{self.where}/{index}: names {show(files)}; expected files beside it")
        return files

    def _copy(self, names: Collection[str]) -> Path:
        folder = Path(self._copies.name)
        for name in names:
            path = folder / name
            if not path.exists():
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise CheckpointError(f"{self.where}: lists a file outside of itself, {name!r}")
                content = self._read(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            content = self._repository.read(self._prefix + name, start, stop)
        except OSError as error:
            raise CheckpointError(f"{self.where}/{name}: cannot be read ({error})") from error
        if stop is not None and len(content) != stop - start:
            raise CheckpointError(
                f"{self.where}/{name}: gave {len(content)} bytes of the {stop - start} from {start} on; it was not "
                "uploaded to the end"
            )
        return content


class RangedTensors:
    """The tensors of safetensors files of which ranges are read: the headers, and each tensor when it is asked for.

    Args:
        read: gives the bytes of a file's range.
        files: names of the files.
        where: what to call the place in texts of errors.

    Raises:
        CheckpointError: a header is damaged, or a tensor is in several files.
    """

    def __init__(self, read: Any, files: Collection[str], *, where: str) -> None:
        self._read_range = read
        self._where = where
        # By tensor: the file, its first byte and the one behind its last.
        self._places: dict[str, tuple[str, int, int]] = {}
        self._headers: dict[str, TensorHeader] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            self._open(file)

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._places.keys()

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor."""
        return self._headers[name]

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, in memory of its own."""
        file, start, stop = self._places[name]
        shape, dtype = self._headers[name].shape, self._dtypes[name]
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        content = bytearray(self._read_range(file, start, stop))
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def _open(self, file: str) -> None:
        length = int.from_bytes(self._read_range(file, 0, 8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise CheckpointError(f"{self._where}/{file}: is no safetensors file, or damaged; upload it again")
        try:
            header = json.loads(self._read_range(file, 8, 8 + length))
            metadata = header.pop("__metadata__", {})
            read = {name: self._place(file, 8 + length, described) for name, described in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self._where}/{file}: its header is damaged ({error}); upload it again") from error
        doubled = sorted(read.keys() & self._places.keys())
        if doubled:
            raise CheckpointError(f"{self._where}: tensors that are in several files: {join_names(doubled)}")
        for name, (place, dtype, shape) in read.items():
            self._places[name], self._dtypes[name] = place, dtype
            self._headers[name] = TensorHeader(str(dtype).removeprefix("torch."), shape)
        digest = metadata.get(HEADER_DIGEST)
        if digest is not None and digest != digest_headers((name, self._headers[name]) for name in read):
            raise CheckpointError(f"{self._where}/{file}: its header is not the one that was written; upload it again")

    @staticmethod
    def _place(
        file: str, offset: int, described: Mapping[str, Any]
    ) -> tuple[tuple[str, int, int], torch.dtype, tuple[int, ...]]:
        dtype, shape = _torch_dtype(described["dtype"]), tuple(map(int, described["shape"]))
        start, stop = map(int, described["data_offsets"])
        if min((start, *shape), default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{show(described)} does not fit together")
        return (file, offset + start, offset + stop), dtype, shape


def _torch_dtype(name: str) -> torch.dtype:
    """The dtype that a file calls so.

    Raises:
        KeyError: there is none.
        ValueError: this version of torch lacks it.
    """
    dtype = getattr(torch, DTYPES[name], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {DTYPES[name]}; take a newer one")
    return dtype
