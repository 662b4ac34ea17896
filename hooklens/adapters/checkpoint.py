"""Checkpoints on disk: `config.json` with weights, and what stands beside them.

Tensors are handed out one by one, so loading takes about one copy of the model.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.choice import find_family
from hooklens.adapters.conversion import HubModel, config_of_layers, config_of_length
from hooklens.adapters.families import load_families
from hooklens.adapters.files.companions import read_generation_config, read_transforms
from hooklens.adapters.files.disk import read_json
from hooklens.adapters.files.tokenizer_files import load_tokenizer
from hooklens.adapters.formats import OpenedModel
from hooklens.adapters.kept import Kept
from hooklens.adapters.sources import CheckpointFiles, HubFiles, LocalFiles, OldFiles, Repository, open_files
from hooklens.adapters.wrapping import unwrap_config
from hooklens.arguments import show
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError, UnsupportedModelError, join_names
from hooklens.optional import import_package
from hooklens.tokens import Tokenizer

_WEIGHTS = tuple(
    whole + suffix for whole in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")
)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What only loading needs is imported then.
_QUANTISED = "hooklens.adapters.dequantised"


class Checkpoint:
    """A checkpoint whose config and tensor names and shapes have been checked; no weight is read yet.

    Args:
        files: where they lie.

    Attributes:
        folder: where the files beside the weights lie; a temporary folder where they came from no folder.
        cfg: the network.
        dtype: dtype of the weights: the config's, or else that of the embedding. Quantised weights are dequantised.
        transforms: the weight-processing steps that its weights have been through.
        generation_config: the contents of its `generation_config.json`; empty where there is none.

    Raises:
        CheckpointError: files are missing or damaged, or it does not hold the tensors that its config promises.
        UnsupportedModelError: the architecture or a config value is not implemented; no weight has been fetched then.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        # What `folder` names exists as long as they do.
        self._files = files
        self.folder = folder = files.folder()
        self._model, dtype = (files.open(), None) if isinstance(files, OldFiles) else _open_model(files)
        self.cfg: HookedConfig = self._model.cfg
        self.dtype: torch.dtype = dtype or next(self._model.tensors([]))[1].dtype
        self.transforms: tuple[str, ...] = read_transforms(folder)
        self.generation_config: dict[str, Any] = read_generation_config(folder)

    def tensors(
        self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None, let_go: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes, in the file's dtype, one by one.

        Tensors that need no rearranging are views of the memory-mapped file. A tied unembedding comes right after
        the embedding and shares its storage.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.
            n_ctx: how many learned positions to take. None: all.
            let_go: names of tensors that are not kept: pages of a file that is mapped for them go with them.

        Raises:
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        if isinstance(self._model, HubModel):
            return self._model.tensors(layers, n_ctx=n_ctx, let_go=let_go)
        return self._model.tensors(layers, n_ctx=n_ctx)

    def read(self, name: str) -> Tensor:
        """One tensor, by its HookLens name and in its logical shape; `cfg.description.weights` has the names.

        Raises:
            KeyError: the network has no such weight.
        """
        if isinstance(self._model, HubModel):
            return self._model.read(name)
        for found, tensor in self._model.tensors():
            if found == name:
                return tensor
        raise KeyError(name)

    def kept_tensors(
        self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None
    ) -> Iterator[tuple[str, Tensor | Kept]]:
        """The same, but for the weights of linear maps that are quantised: these as they are stored.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.
            n_ctx: how many learned positions to take. None: all.

        Raises:
            UnsupportedModelError: no weights are quantised, or some cannot be kept as they are; all are listed.
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        if not isinstance(self._model, HubModel):
            raise UnsupportedModelError(
                f"{self.folder}: quantize='keep', and no weights are quantised in a checkpoint of an old format"
            )
        return self._model.kept_tensors(layers, n_ctx=n_ctx)

    def config_for(self, layers: Sequence[int] | None, *, n_ctx: int | None = None) -> HookedConfig:
        """The config of the model that `tensors(layers, n_ctx=n_ctx)` fills.

        Raises:
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        return config_of_length(config_of_layers(self.cfg, layers), n_ctx)

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, or None where it holds none.

        Raises:
            CheckpointError: its files are damaged.
        """
        return load_tokenizer(self.folder)


def _check_contents(folder: Path) -> None:
    """Refuse folders that hold something else than a checkpoint, and say what they hold."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UnsupportedModelError(
            f"{folder}: holds a PEFT adapter (adapter_config.json) for the model {show(base)}, not a model. Merge them "
            "with peft: PeftModel.from_pretrained(base, folder).merge_and_unload(), which goes to "
            "HookedCausalLM.from_hf or, saved, to from_pretrained"
        )
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    inside = [path.parent.name for path in folder.glob("*/config.json")]
    if inside:
        # A trainer numbers its folders by steps.
        ordered = sorted(inside, key=lambda name: (len(name), name))
        raise CheckpointError(
            f"{folder}: holds no checkpoint itself, but folders that do: {join_names(ordered)}; give one of them, "
            f"{str(folder / ordered[-1])!r}"
        )


def _read_dtype(config: Mapping[str, Any], *, where: str) -> torch.dtype | None:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{where}: config.json gives {key} {show(name)}; expected a floating-point torch dtype: "
            "float64, float32, float16 or bfloat16"
        )
    return dtype


def read_network(config: Mapping[str, Any], *, where: str, warn: bool = True) -> HookedConfig:
    """The network that a `config.json` describes; what only the tensors can tell of it is as the config says.

    Args:
        config: its contents.
        where: what to call it in texts of errors.
        warn: of keys that HookLens does not know.

    Raises:
        UnsupportedModelError: the architecture or a config value is not implemented.
        CheckpointError: values are nested too deeply.
    """
    try:
        plain, _ = import_package(_QUANTISED).read_quantisation(config, where=where)
        config = unwrap_config(plain, load_families())
        return find_family(config, load_families(), where=where).read_config(config, where=where, warn=warn)
    except RecursionError as error:
        raise CheckpointError(f"{where}: config.json holds values nested too deeply to be a config's") from error


def _open_model(files: CheckpointFiles) -> tuple[OpenedModel, torch.dtype | None]:
    """The model of a folder in the hub's layout, the config read before any weight is fetched, and its dtype."""
    where = files.where
    _check_contents(files.folder())
    config = read_json(files.folder() / "config.json")
    read_network(config, where=where, warn=False)
    quantised = import_package(_QUANTISED)
    plain, scheme = quantised.read_quantisation(config, where=where)
    weights = files.weights()
    if scheme is not None:
        family = find_family(unwrap_config(plain, load_families()), load_families(), where=where)
        weights = quantised.DequantisedTensors(weights, scheme, where=where, conv1d=family.is_conv1d, head=family.head)
    return HubModel(plain, weights, where=where), _read_dtype(config, where=where)


def open_checkpoint(source: "str | Path | Repository", **options: Any) -> Checkpoint:
    """Open a checkpoint: a local folder (no network is touched), a name on the hub, a URL, or a repository.

    Args:
        source: see `open_files`.
        **options: those of `open_files`.

    Raises:
        CheckpointError: the checkpoint cannot be found, read, or does not hold the tensors that its config promises.
        UnsupportedModelError: the architecture or a config value is not implemented.
        InputError: an option that this kind of source has not.
    """
    return Checkpoint(open_files(source, **options))


def open_config(source: "str | Path | Repository", **options: Any) -> HookedConfig:
    """The network of a checkpoint, of which nothing but `config.json` is fetched.

    Args:
        source: see `open_files`.
        **options: those of `open_files`.

    Raises:
        CheckpointError: there is no `config.json`, or it is damaged.
        UnsupportedModelError: the architecture or a config value is not implemented.
        InputError: an option that this kind of source has not.
    """
    files = open_files(source, **options)
    if isinstance(files, OldFiles):
        return files.read_network()
    return read_network(read_json(files.config_folder() / "config.json"), where=files.where)


def download_checkpoint(source: "str | Path | Repository", **options: Any) -> Path:
    """Fetch a checkpoint from the hub, config first, and give the folder of the cache that holds it.

    Args:
        source: a name on the hub, or a folder, which is given back.
        **options: those of `open_files`.

    Raises:
        CheckpointError: there is no such repository, it is not open to you, or the download failed.
        UnsupportedModelError: the architecture or a config value is not implemented.
        InputError: a URL or a repository, of which no copy is kept.
    """
    files = open_files(source, **options)
    if isinstance(files, OldFiles):
        files.read_network()
    else:
        read_network(read_json(files.config_folder() / "config.json"), where=files.where)
    if not isinstance(files.place if isinstance(files, OldFiles) else files, HubFiles | LocalFiles):
        raise InputError(f"{files.where}: is read where it lies, and no copy is kept; expected a name on the hub")
    if isinstance(files, OldFiles):
        return files.download()
    if isinstance(files, HubFiles):
        files.download_weights()
    return files.folder()
