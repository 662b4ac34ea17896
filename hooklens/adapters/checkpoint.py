"""Checkpoints on disk: `config.json` with safetensors or `pytorch_model.bin` files, whole or in shards.

Files are memory-mapped and tensors are handed out one by one, so loading takes about one copy of the model. Nothing
in a checkpoint is executed: pickles are read with `weights_only=True`.
"""

import json
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooklens.adapters.conversion import HubModel, config_of_layers
from hooklens.adapters.hub import find_folder
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, UnsupportedModelError, join_names

_DAMAGED = "The file is damaged or was not downloaded to the end: delete it and download it again"


@runtime_checkable
class _ShardReader(Protocol):
    """Reads one kind of weight file."""

    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]: ...

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor: ...


class _SafetensorsReader:
    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        file = self._file(path)
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor:
        # In a mapping of its own: the pages of a tensor that is split into copies are given back with it.
        tensor: Tensor = (_open_safetensors(path) if apart else self._file(path)).get_tensor(name)
        return tensor

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}). {_DAMAGED}") from error


class _PickleReader:
    """Keeps one file loaded at a time: tensors of a mapped file cost nothing until they are touched."""

    def __init__(self) -> None:
        self._loaded: tuple[Path, Mapping[str, Tensor]] | None = None

    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state(path).items()}

    def read(self, path: Path, name: str, *, apart: bool) -> Tensor:
        return self._state(path)[name].detach()

    def _state(self, path: Path) -> Mapping[str, Tensor]:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            self._loaded = (path, _load_pickle(path))
        return self._loaded[1]


def _load_pickle(path: Path) -> Mapping[str, Tensor]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds something other than tensors, or is damaged ({_reason(error)}). Loading never "
            "runs code from a checkpoint; take a safetensors version, or download the file again"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a PyTorch file ({error}). {_DAMAGED}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: expected a mapping from names to tensors, found {type(state).__name__} of other things; save the "
            "model's state_dict itself"
        )
    return state


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch found, without its advice on how to run the code all the same."""
    found = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return found.partition(". Please use")[0].strip()


class DiskTensors:
    """The tensors of a folder: which file each one is in, their shapes, and reading them one at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader, listed = _find_files(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(listed.values()):
            for name, shape in self._reader.shapes(path).items():
                self._files[name], self._shapes[name] = path, shape
        absent = [name for name in listed if name and name not in self._files]
        if absent:
            raise CheckpointError(
                f"{folder}: the index lists tensors that the files do not hold: {join_names(absent)}. {_DAMAGED}"
            )

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return self._shapes[name]

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, memory-mapped where the file allows; see `TensorSource`."""
        return self._reader.read(self._files[name], name, apart=apart)


def _find_files(folder: Path) -> tuple[_ShardReader, dict[str, Path]]:
    """The reader for the folder's weights, and the file of each tensor (the name is empty where no index lists it)."""
    kinds: list[tuple[_ShardReader, str]] = [
        (_SafetensorsReader(), "model.safetensors"),
        (_PickleReader(), "pytorch_model.bin"),
    ]
    for reader, whole in kinds:
        if (folder / whole).is_file():
            return reader, {"": folder / whole}
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return reader, _read_index(index)
    found = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"{folder}: holds no weights; expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json, found {join_names(found) or 'an empty folder'}"
    )


def _read_index(index: Path) -> dict[str, Path]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to files. {_DAMAGED}")
    # Only names in the folder itself: an index cannot point elsewhere on the disk.
    files = {name: index.parent / Path(file).name for name, file in weight_map.items()}
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(set(files.values()))} weight files are missing: "
            f"{join_names(missing)}. Download them again"
        )
    return files


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). {_DAMAGED}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class Checkpoint:
    """A checkpoint folder whose config and tensor names and shapes have been checked; no weight is read yet.

    Attributes:
        folder: where it lies; tokenizer files are there too.
        cfg: the network.
        dtype: dtype of the weights: the config's, or else that of the embedding.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        source = DiskTensors(folder)
        self._model = HubModel(config, source, where=str(folder))
        self.folder = folder
        self.cfg: HookedConfig = self._model.cfg
        self.dtype: torch.dtype = _read_dtype(config, where=str(folder)) or next(self._model.tensors([]))[1].dtype

    def tensors(self, layers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes, in the file's dtype, one by one.

        Tensors that need no rearranging are views of the memory-mapped file. A tied unembedding comes right after
        the embedding and shares its storage.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.

        Raises:
            InputError: a layer does not exist or is given twice.
        """
        return self._model.tensors(layers)

    def config_for(self, layers: Sequence[int] | None) -> HookedConfig:
        """The config of the model that `tensors(layers)` fills.

        Raises:
            InputError: a layer does not exist or is given twice.
        """
        return config_of_layers(self.cfg, layers)


def _read_dtype(config: Mapping[str, Any], *, where: str) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedModelError(f"{where}: config.json gives dtype {name!r}; expected a floating-point torch dtype")
    return dtype


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint: a local folder (no network is touched) or a name on the Hugging Face hub.

    Args:
        source: folder or hub name.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; None: the hub's own cache.
        local_files_only: take what has been downloaded before and touch no network.

    Raises:
        CheckpointError: the checkpoint cannot be found, read, or does not hold the tensors that its config promises.
        UnsupportedModelError: the architecture or a config value is not implemented.
    """
    folder = find_folder(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    return Checkpoint(folder)
