"""Checkpoints on disk: `config.json` with weights, and what stands beside them.

Tensors are handed out one by one, so loading takes about one copy of the model.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.adapters.choice import find_family
from hooklens.adapters.conversion import HubModel, config_of_layers, config_of_length
from hooklens.adapters.families import load_families
from hooklens.adapters.files.companions import read_generation_config, read_transforms
from hooklens.adapters.files.disk import read_json
from hooklens.adapters.files.tokenizer_files import load_tokenizer
from hooklens.adapters.formats import OpenedModel
from hooklens.adapters.formats.place import Place
from hooklens.adapters.kept import Kept
from hooklens.adapters.sources import CheckpointFiles, HubFiles, LocalFiles, OldFiles, Repository, open_files
from hooklens.adapters.wrapping import untie_config, unwrap_config
from hooklens.arguments import show
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError, UnsupportedModelError, join_names, warn_caller
from hooklens.optional import import_package
from hooklens.tokens import Tokenizer

if TYPE_CHECKING:
    from hooklens.adapters.lora import LoraAdapter

_WEIGHTS = tuple(
    whole + suffix for whole in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")
)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What only loading needs is imported then.
_QUANTISED = "hooklens.adapters.dequantised"
_LORA = "hooklens.adapters.lora"
_ADAPTER = "adapter_config.json"


class Checkpoint:
    """A checkpoint whose config and tensor names and shapes have been checked; no weight is read yet.

    Args:
        files: where they lie.
        adapters: LoRA adapters that are added to its weights, in this order.
        dtype: in which weights are handed out that adapters are added to; None: the checkpoint's.
        beside: files whose tokenizer goes before that of the checkpoint, where there is one among them.

    Attributes:
        folder: where the files beside the weights lie; a temporary folder where they came from no folder.
        cfg: the network.
        dtype: dtype of the weights: the config's, or else that of the embedding. Quantised weights are dequantised.
        transforms: the weight-processing steps that its weights have been through.
        generation_config: the contents of its `generation_config.json`; empty where there is none.

    Raises:
        CheckpointError: files are missing or damaged, or it does not hold the tensors that its config promises.
        UnsupportedModelError: the architecture or a config value is not implemented; no weight has been fetched then.
            Or its weights cannot have adapters added to them.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        adapters: "Sequence[LoraAdapter]" = (),
        dtype: torch.dtype | None = None,
        beside: CheckpointFiles | None = None,
    ) -> None:
        # What `folder` names exists as long as they do.
        self._files, self._beside = files, beside
        self.folder = folder = files.folder()
        self._adapters = tuple(adapters)
        if adapters:
            _check_base(files, read_transforms(folder))
        own: torch.dtype | None = None
        if isinstance(files, OldFiles):
            self._model: OpenedModel = files.open()
        else:
            self._model, own = _open_model(files, adapters, dtype)
        self.cfg: HookedConfig = self._model.cfg
        self.dtype: torch.dtype = own or next(self._model.tensors([]))[1].dtype
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
        if self._adapters:
            raise UnsupportedModelError(
                f"{self.folder}: quantize='keep', and what an adapter is added to would have to be rounded again; "
                "leave quantize out, and the weights are dequantised, or take quantize='int8' or 'int4'"
            )
        return self._model.kept_tensors(layers, n_ctx=n_ctx)

    def config_for(self, layers: Sequence[int] | None, *, n_ctx: int | None = None) -> HookedConfig:
        """The config of the model that `tensors(layers, n_ctx=n_ctx)` fills.

        Raises:
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        return config_of_length(config_of_layers(self.cfg, layers), n_ctx)

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, or None where it holds none; that of an adapter's folder goes before it.

        Raises:
            CheckpointError: its files are damaged.
        """
        beside = None if self._beside is None else load_tokenizer(self._beside.folder())
        return load_tokenizer(self.folder) if beside is None else beside


def _check_contents(folder: Path, *, has_adapters: bool) -> None:
    """Refuse folders that hold something else than a checkpoint, and say what they hold."""
    if (folder / _ADAPTER).is_file() and not has_adapters:
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
        raise UnsupportedModelError(
            f"{folder}: holds a PEFT adapter ({_ADAPTER}) for the model {show(base)} beside a model. Give the folder "
            "as adapter, too, and it is added to this model; or take it out"
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


def _open_model(
    files: CheckpointFiles, adapters: "Sequence[LoraAdapter]", dtype: torch.dtype | None
) -> tuple[OpenedModel, torch.dtype | None]:
    """The model of a folder in the hub's layout, the config read before any weight is fetched, and its dtype."""
    where = files.where
    _check_contents(files.folder(), has_adapters=bool(adapters))
    config = read_json(files.folder() / "config.json")
    cfg = read_network(config, where=where, warn=False)
    quantised = import_package(_QUANTISED)
    plain, scheme = quantised.read_quantisation(config, where=where)
    weights, own = files.weights(), _read_dtype(config, where=where)
    family = find_family(unwrap_config(plain, load_families()), load_families(), where=where)
    if scheme is not None:
        weights = quantised.DequantisedTensors(weights, scheme, where=where, conv1d=family.is_conv1d, head=family.head)
    if adapters:
        merged = import_package(_LORA).MergedTensors(weights, adapters, family, cfg, where=where, dtype=dtype or own)
        plain, weights, own = untie_config(plain) if merged.unties else plain, merged, dtype or own
    return HubModel(plain, weights, where=where), own


def _check_base(files: CheckpointFiles, transforms: Sequence[str]) -> None:
    """Refuse a checkpoint whose weights cannot have adapters added to them."""
    if isinstance(files, OldFiles):
        raise UnsupportedModelError(
            f"{files.where}: is in an old format, whose tensors do not have the names that an adapter's are for; take "
            "the base in Hugging Face format"
        )
    if transforms:
        raise UnsupportedModelError(
            f"{files.where}: its weights were processed ({', '.join(transforms)}), which would hold no longer with an "
            "adapter added; add it to the unprocessed model, and take these steps then, model.process_weights(...)"
        )


def open_checkpoint(
    source: "str | Path | Repository",
    *,
    adapters: "Sequence[LoraAdapter]" = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Checkpoint:
    """Open a checkpoint: a local folder (no network is touched), a name on the hub, a URL, or a repository.

    A source that is an adapter of PEFT gives the base that it names, with the adapter added.

    Args:
        source: see `open_files`.
        adapters: LoRA adapters that are added to its weights, in this order.
        dtype: in which weights are handed out that adapters are added to; None: the checkpoint's.
        **options: those of `open_files`.

    Raises:
        CheckpointError: the checkpoint cannot be found, read, or does not hold the tensors that its config promises.
        UnsupportedModelError: the architecture or a config value is not implemented.
        InputError: an option that this kind of source has not.
    """
    files = open_files(source, **options)
    if not _is_adapter(files):
        for adapter in adapters:
            _tell_of_other_base(adapter, files)
        return Checkpoint(files, adapters=adapters, dtype=dtype)
    lora = import_package(_LORA)
    own = lora.read_files(files)
    base = lora.open_base(files, options)
    if _is_adapter(base):
        raise UnsupportedModelError(
            f"{files.where}: is a PEFT adapter whose base, {base.where}, is one itself; give the model that they are "
            "for as source, and both as adapter"
        )
    warn_caller(f"{files.where}: is a PEFT adapter; its base {base.where} is loaded, with the adapter merged into it")
    return Checkpoint(base, adapters=(own, *adapters), dtype=dtype, beside=files)


def _tell_of_other_base(adapter: "LoraAdapter", files: CheckpointFiles) -> None:
    """Warn of an adapter that was made for a model of another name: a fine-tune of it will do, a stranger will not."""
    base = adapter.settings.base
    where = str(Path(files.where).resolve()) if isinstance(files, LocalFiles) else files.where
    # Wherever it may lie: a path's last part, or the repository's name, which its folder in the hub's cache has, too.
    if base is not None and Path(base).name.lower() not in where.lower():
        warn_caller(
            f"{adapter.where}: was made for {base!r} by its adapter_config.json, and is merged into {where}; that is "
            "right where the two hold the same weights"
        )


def _is_adapter(files: CheckpointFiles) -> bool:
    """Whether files are those of an adapter of PEFT, without a model beside it."""
    if isinstance(files, HubFiles):
        # Of a model nothing more than its config is fetched to tell.
        if (files.config_folder() / "config.json").is_file():
            return False
        return (files.fetch([_ADAPTER]) / _ADAPTER).is_file()
    names = files.names() if isinstance(files, Place) else ()
    return _ADAPTER in names and "config.json" not in names


def open_config(source: "str | Path | Repository", **options: Any) -> HookedConfig:
    """The network of a checkpoint, of which nothing but `config.json` is fetched; of an adapter that of its base.

    Args:
        source: see `open_files`.
        **options: those of `open_files`.

    Raises:
        CheckpointError: there is no `config.json`, or it is damaged.
        UnsupportedModelError: the architecture or a config value is not implemented.
        InputError: an option that this kind of source has not.
    """
    files = open_files(source, **options)
    if _is_adapter(files):
        files = import_package(_LORA).open_base(files, options)
    return _read_network(files)


def _read_network(files: CheckpointFiles) -> HookedConfig:
    """The network of a checkpoint, by its config alone."""
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
    if _is_adapter(files):
        return _download_adapter(files, options)
    _read_network(files)
    if not isinstance(files.place if isinstance(files, OldFiles) else files, HubFiles | LocalFiles):
        raise InputError(f"{files.where}: is read where it lies, and no copy is kept; expected a name on the hub")
    if isinstance(files, OldFiles):
        return files.download()
    if isinstance(files, HubFiles):
        files.download_weights()
    return files.folder()


def _download_adapter(files: CheckpointFiles, options: Mapping[str, Any]) -> Path:
    """Fetch an adapter and its base, and give the adapter's folder."""
    lora = import_package(_LORA)
    base = lora.open_base(files, options)
    _read_network(base)
    lora.read_files(files)
    for one in (files, base):
        if isinstance(one, HubFiles) and one is base:
            one.download_weights()
        elif not isinstance(one, HubFiles | LocalFiles):
            raise InputError(f"{one.where}: is read where it lies, and no copy is kept; expected a name on the hub")
        one.folder()
    return files.folder()
