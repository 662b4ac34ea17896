"""Writing checkpoint folders that transformers loads."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooklens.adapters.files.companions import GENERATION, RECORD, write_generation_config, write_transforms
from hooklens.adapters.files.disk import HEADER_DIGEST, digest_headers, header_of
from hooklens.adapters.files.folder import replace_files
from hooklens.adapters.files.tokenizer_files import TOKENIZER_FILES, can_be_written
from hooklens.adapters.layout import HubLayout, with_dtype
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.tokens import Tokenizer
from hooklens.weights.offloaded import values_of

INDEX = "model.safetensors.index.json"
"""The file that says which of several files a tensor is in."""
ALWAYS_REPLACED = ("model*.safetensors", INDEX, GENERATION, RECORD)
"""Patterns of the files of an older checkpoint of which none may stay beside a newer one."""


def write_checkpoint(
    folder: str | Path,
    cfg: HookedConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    transforms: Sequence[str] = (),
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write `config.json` and safetensors files that `AutoModelForCausalLM.from_pretrained` loads.

    All files take their places in one step (`replace_files`): an interrupted save leaves the old checkpoint or the new
    one, never a mixture. Writing into the folder that a model was loaded from is safe. Of an older checkpoint in the
    folder nothing stays but the tokenizer, where none is given, and files that no checkpoint has.

    Args:
        folder: where to; made if it is not there.
        cfg: the network.
        state: its parameters under HookLens names; a tied `unembed.W_U` may be left out.
        dtype: dtype on disk; None: each tensor's own.
        max_shard_size: bytes, or `"5GB"`; more than that is split into several files and an index.
        transforms: the weight-processing steps it has been through, which `hooklens.json` records.
        generation_config: contents of `generation_config.json`; None or empty: there is to be none.
        tokenizer: written, too; None: the folder's stays.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`, or `folder` is a file, holds an adapter, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    layout = HubLayout(cfg, state, transforms=transforms)
    main_dtype = state["embed.W_E"].dtype if dtype is None else dtype
    config = with_dtype(layout.config, str(main_dtype).removeprefix("torch."))
    plan = plan_shards(
        {name: (dtype or layout.dtype(name), layout.shape(name)) for name in layout.names()}, max_shard_size
    )
    with_tokenizer = can_be_written(tokenizer)
    stale = (*ALWAYS_REPLACED, *TOKENIZER_FILES) if with_tokenizer else ALWAYS_REPLACED
    with replace_files(folder, stale=stale) as new:
        n_tensors = sum(map(len, plan.filename_to_tensors.values()))
        with progress_bar("saving weights", total=n_tensors, unit="tensor", progress=None) as bar:
            for file, names in plan.filename_to_tensors.items():
                _write_shard(new / file, layout, names, dtype, bar.update)
        if plan.is_sharded:
            write_json(new / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        write_json(new / "config.json", config)
        write_transforms(new, transforms)
        write_generation_config(new, generation_config or {})
        if with_tokenizer:
            tokenizer.save_pretrained(str(new))  # type: ignore[union-attr]


def check_folder(folder: Path) -> None:
    """Refuse to write a checkpoint where transformers would not read it as one.

    Raises:
        CheckpointError: it is a file, or a folder with an adapter.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; expected a folder to save into")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: holds a PEFT adapter (adapter_config.json), which transformers would put on what is saved "
            "here; save into another folder"
        )


def plan_shards(outlines: Mapping[str, tuple[torch.dtype, Sequence[int]]], max_shard_size: int | str) -> Any:
    """Which file each tensor goes to, as huggingface_hub plans it.

    Args:
        outlines: dtype and shape of each tensor, in the order of the network.
        max_shard_size: bytes, or `"5GB"`.
    """
    return import_package("huggingface_hub").split_torch_state_dict_into_shards(
        # Tensors without storage are enough.
        {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, (dtype, shape) in outlines.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _write_shard(
    path: Path, layout: HubLayout, names: list[str], dtype: torch.dtype | None, tell: Callable[[], object]
) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = values_of(layout.make(name))
        tensor = tensor if dtype is None else tensor.to(dtype)
        # safetensors refuses tensors that share storage, as an untied unembedding may still do.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
        tell()
    digest = digest_headers((name, header_of(tensor)) for name, tensor in tensors.items())
    try:
        save_file(tensors, path, metadata={"format": "pt", HEADER_DIGEST: digest})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
