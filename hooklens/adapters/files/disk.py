"""Files of a checkpoint folder: JSON objects, and tensors in safetensors or PyTorch files, whole or in shards.

Files are memory-mapped and tensors are handed out one by one. Nothing in a file is executed: pickles are read with
`weights_only=True`. What cannot be read is refused with the reason: cut off, a git-lfs pointer, a web page.

The header of a safetensors file that HookLens wrote is checked against a digest in its metadata. The entries of tensors
are not: a checksum of them would read every byte of a file of which only the header has to be read before a tensor is
needed.
"""

import hashlib
import json
import mmap
import pickle
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooklens.arguments import show
from hooklens.errors import CheckpointError, join_names

HEADER_DIGEST = "hooklens.header"
"""The key of a safetensors file's metadata under which the digest of its header stands."""

_DAMAGED = "The file is damaged or was not downloaded to the end: delete it and download it again"
_POINTER = b"version https://git-lfs"
_PAGE = (b"<!doctype", b"<html")
# As safetensors calls them, and torch, of which old versions lack some. What is not listed keeps the file's name.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def explain_damage(path: Path) -> str:
    """Why a file cannot be read and what to do, by how it begins."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError:
        return "Check that the file can be read"
    if start.startswith(_POINTER):
        return "It is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`"
    if start.lower().startswith(_PAGE):
        return "It is a web page, not the file itself: download it with `hf download`"
    return _DAMAGED


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: holds no {path.name}; expected a checkpoint folder with config.json and weights"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON (nested too deeply). {_DAMAGED}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). {explain_damage(path)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class TensorHeader(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        dtype: its name in torch, `"float32"`.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


def digest_headers(headers: Iterable[tuple[str, TensorHeader]]) -> str:
    """A digest of the names, dtypes and shapes of a file's tensors."""
    described = sorted([name, header.dtype, list(header.shape)] for name, header in headers)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


class _Entries(NamedTuple):
    """Where the entries of a tensor lie in a safetensors file; no dtype: not one that torch has."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int


def _locate_entries(path: Path) -> dict[str, _Entries]:
    """Where the entries of each tensor of a safetensors file lie, which safetensors has checked."""
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header))
    located = {}
    for name, found in header.items():
        if name != "__metadata__":
            start, end = (8 + n_header + offset for offset in found["data_offsets"])
            dtype = getattr(torch, DTYPES.get(found["dtype"], ""), None)
            located[name] = _Entries(dtype, tuple(found["shape"]), start, end)
    return located


@runtime_checkable
class _WeightReader(Protocol):
    """Reads one kind of weight file."""

    def headers(self, path: Path) -> dict[str, TensorHeader]: ...

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor: ...


class _SafetensorsReader:
    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._entries: dict[Path, dict[str, _Entries]] = {}

    def headers(self, path: Path) -> dict[str, TensorHeader]:
        file = self._file(path)
        headers = {name: _read_header(file, name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        digest = (file.metadata() or {}).get(HEADER_DIGEST)
        if digest is not None and digest != digest_headers(headers.items()):
            raise CheckpointError(
                f"{path}: its header is damaged: names, dtypes or shapes are not those that were written. {_DAMAGED}"
            )
        return headers

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor:
        # In a mapping of its own: the pages of a tensor that is split into copies are given back with it.
        tensor = self._map(path, name) if apart else None
        if tensor is None:
            tensor = (_open_safetensors(path) if apart else self._file(path)).get_tensor(name)
        return tensor

    def _map(self, path: Path, name: str) -> Tensor | None:
        """A tensor in a mapping of its entries alone; None where they cannot be taken as they lie.

        To open a file once more reads its whole header, which takes longer than to copy a small tensor.
        """
        if path not in self._entries:
            self._entries[path] = _locate_entries(path)
        dtype, shape, start, end = self._entries[path][name]
        into_page = start % mmap.ALLOCATIONGRANULARITY
        if dtype is None or start == end or start % dtype.itemsize or sys.byteorder != "little":
            return None
        with open(path, "rb") as file:
            first = start - into_page
            mapped = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(mapped, dtype=dtype, offset=into_page).view(shape)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def _read_header(file: Any, name: str) -> TensorHeader:
    found = file.get_slice(name)
    dtype = str(found.get_dtype())
    return TensorHeader(DTYPES.get(dtype, dtype), tuple(found.get_shape()))


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}). {explain_damage(path)}") from error


class _PickleReader:
    """Keeps one file loaded at a time: tensors of a mapped file cost nothing until they are touched."""

    def __init__(self) -> None:
        self._loaded: tuple[Path, Mapping[str, Tensor]] | None = None

    def headers(self, path: Path) -> dict[str, TensorHeader]:
        return {name: header_of(tensor) for name, tensor in self._state(path).items()}

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor:
        return self._state(path)[name].detach()

    def _state(self, path: Path) -> Mapping[str, Tensor]:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            self._loaded = (path, load_state(path))
        return self._loaded[1]


def header_of(tensor: Tensor) -> TensorHeader:
    """What a file would say of a tensor."""
    return TensorHeader(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def load_pickle(path: Path) -> Any:
    """What a PyTorch file holds, memory-mapped where the file allows; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged, or holds something that only code can make.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _reason(error)
        if explain_damage(path) != _DAMAGED:
            raise CheckpointError(f"{path}: cannot be read as a PyTorch file. {explain_damage(path)}") from error
        raise CheckpointError(
            f"{path}: refused: it holds something other than tensors, or is damaged ({reason}). Loading never "
            "runs code from a checkpoint; take a safetensors version, or download the file again"
        ) from error
    except Exception as error:
        # A damaged pickle makes torch stumble anywhere.
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be read as a PyTorch file ({found}). {explain_damage(path)}") from error


def load_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a PyTorch file, by name.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    state = load_pickle(path)
    if not is_state(state):
        raise CheckpointError(
            f"{path}: expected a mapping from names to tensors, found {type(state).__name__} of other things; save the "
            "model's state_dict itself"
        )
    tensors: Mapping[str, Tensor] = state
    return tensors


def is_state(content: object) -> bool:
    """Whether it is a mapping from names to tensors that hold their entries one by one."""
    return isinstance(content, Mapping) and all(map(_is_plain, content.keys(), content.values()))


def _is_plain(name: object, tensor: object) -> bool:
    """Whether it is a name and a tensor that holds its entries one by one."""
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch found, without its advice on how to run the code all the same."""
    found = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return found.partition(". Please use")[0].strip()


def weight_file(name: str, variant: str | None) -> str:
    """The name of a weight file, or of its index, in a variant: `model.fp16.safetensors`, as transformers has it."""
    if variant is None:
        return name
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}"


class DiskTensors:
    """The tensors of a folder: which file each one is in, what its header says, and reading them one at a time.

    Args:
        folder: which.
        variant: `"fp16"` reads `model.fp16.safetensors`; None: `model.safetensors`.
        files: the names of the file in safetensors and in PyTorch's format.

    Where an index lists tensors, each is read from the file that the index says, whatever other files hold.

    Raises:
        CheckpointError: there are no weights, files are missing or damaged, or they do not hold what the index says.
    """

    def __init__(
        self,
        folder: Path,
        *,
        variant: str | None = None,
        files: tuple[str, str] = ("model.safetensors", "pytorch_model.bin"),
    ) -> None:
        self._reader, listed, paths = _find_files(folder, variant, files)
        headers = {path: self._reader.headers(path) for path in paths}
        self._files = dict(listed)
        problems = [f"{name!r} in {path.name}" for name, path in listed.items() if name not in headers[path]]
        if problems:
            raise CheckpointError(
                f"{folder}: the index lists tensors that the files do not hold: {', '.join(problems[:20])}. {_DAMAGED}"
            )
        doubled = []
        for path, found in sorted(headers.items()):
            for name in found.keys() - listed.keys():
                if name in self._files:
                    doubled.append(f"{name!r} in {self._files[name].name} and {path.name}")
                self._files[name] = path
        if doubled:
            listing = ", ".join(sorted(doubled)[:20])
            raise CheckpointError(
                f"{folder}: tensors that the index does not list are in several files: {listing}. "
                "Files of an older save seem to be left: download or save the checkpoint again"
            )
        self._headers = {name: headers[path][name] for name, path in self._files.items()}

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._files.keys()

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor, from the file's header."""
        return self._headers[name]

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, memory-mapped where the file allows; see `TensorSource`."""
        return self._reader.read(self._files[name], name, apart=apart)


def _find_files(
    folder: Path, variant: str | None, files: tuple[str, str]
) -> tuple[_WeightReader, dict[str, Path], list[Path]]:
    """The reader for the folder's weights, the file of each tensor that an index lists, and all files."""
    kinds: list[tuple[_WeightReader, str]] = [(_SafetensorsReader(), files[0]), (_PickleReader(), files[1])]
    for reader, name in kinds:
        whole = folder / weight_file(name, variant)
        if whole.is_file():
            return reader, {}, [whole]
        index = folder / weight_file(f"{name}.index.json", variant)
        if index.is_file():
            listed = _read_index(index)
            return reader, listed, list(dict.fromkeys(listed.values()))
    found = sorted(path.name for path in folder.iterdir())
    of_variant = "" if variant is None else f" of variant {variant!r} ({weight_file(files[0], variant)})"
    raise CheckpointError(
        f"{folder}: holds no weights{of_variant}; expected {files[0]}, {files[0]}.index.json, {files[1]} or "
        f"{files[1]}.index.json, found {join_names(found) or 'an empty folder'}"
    )


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: 'weight_map' is {show(weight_map)}, expected an object from tensor names to files. {_DAMAGED}"
        )
    wrong = [f"{name!r}: {show(file)}" for name, file in weight_map.items() if not isinstance(file, str) or not file]
    if wrong:
        raise CheckpointError(
            f"{index}: 'weight_map' gives {', '.join(wrong[:20])}; expected names of files. {_DAMAGED}"
        )
    # Only names in the folder itself: an index cannot point elsewhere on the disk.
    files = {name: index.parent / Path(file).name for name, file in weight_map.items()}
    missing = sorted({path.name for path in files.values() if not _is_file(path)})
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(set(files.values()))} weight files are missing: "
            f"{join_names(missing)}. Download them again"
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # No name that the file system could have.
        return False
