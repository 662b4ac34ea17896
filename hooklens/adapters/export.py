"""Writing checkpoints that transformers loads, to a folder or as a model in memory."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from hooklens.adapters.conversion import HubLayout, to_hub, with_dtype
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError
from hooklens.optional import import_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"


def write_checkpoint(
    folder: str | Path,
    cfg: HookedConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    transforms: Sequence[str] = (),
) -> None:
    """Write `config.json` and safetensors files that `AutoModelForCausalLM.from_pretrained` loads.

    Weights are written beside what the folder holds and take its place only when all are there; `config.json`
    comes last. An interrupted save leaves the old checkpoint, or a folder without `config.json`, never a mixture.
    Writing into the folder that a model was loaded from is safe.

    Args:
        folder: where to; made if it is not there.
        cfg: the network.
        state: its parameters under HookLens names; a tied `unembed.W_U` may be left out.
        dtype: dtype on disk; None: each tensor's own.
        max_shard_size: bytes, or `"5GB"`; more than that is split into several files and an index.
        transforms: the weight-processing steps it has been through, for the advice where it cannot be written.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; expected a folder to save into")
    layout = HubLayout(cfg, state, transforms=transforms)
    folder.mkdir(parents=True, exist_ok=True)
    main_dtype = state["embed.W_E"].dtype if dtype is None else dtype
    config = with_dtype(layout.config, str(main_dtype).removeprefix("torch."))

    plan = import_package("huggingface_hub").split_torch_state_dict_into_shards(
        {name: _outline(layout, name, dtype) for name in layout.names()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    try:
        for file, names in plan.filename_to_tensors.items():
            _write_shard(folder / (file + _PARTIAL), layout, names, dtype)
    except BaseException:
        for file in plan.filename_to_tensors:
            (folder / (file + _PARTIAL)).unlink(missing_ok=True)
        raise
    _replace_weights(folder, list(plan.filename_to_tensors))
    if plan.is_sharded:
        _write_json(folder / _INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    _write_json(folder / "config.json", config)


def _outline(layout: HubLayout, name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor without storage: enough to plan the shards."""
    return torch.empty(layout.shape(name), dtype=dtype or layout.dtype(name), device="meta")


def _write_shard(path: Path, layout: HubLayout, names: list[str], dtype: torch.dtype | None) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = layout.make(name)
        tensor = tensor if dtype is None else tensor.to(dtype)
        # safetensors refuses tensors that share storage, as an untied unembedding may still do.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def _replace_weights(folder: Path, files: list[str]) -> None:
    """Put the finished files in place of whatever safetensors checkpoint the folder held."""
    (folder / "config.json").unlink(missing_ok=True)
    stale = {path.name for path in folder.glob("model*.safetensors")} | {_INDEX}
    for name in stale - set(files):
        (folder / name).unlink(missing_ok=True)
    for name in files:
        os.replace(folder / (name + _PARTIAL), folder / name)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def build_hf_model(
    cfg: HookedConfig, state: Mapping[str, Tensor], *, transforms: Sequence[str] = ()
) -> "PreTrainedModel":
    """The transformers model with the same logits, in eval mode, attending with `sdpa`.

    Its parameters share memory with `state` where the layout allows.

    Args:
        cfg: the network.
        state: its parameters under HookLens names; a tied `unembed.W_U` may be left out.
        transforms: the weight-processing steps it has been through, for the advice where it cannot be written.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`.
    """
    transformers = import_package("transformers")
    config, tensors = to_hub(cfg, state, transforms=transforms)
    hf_config = transformers.AutoConfig.for_model(**config)
    model_class = getattr(transformers, config["architectures"][0])
    model: PreTrainedModel = model_class.from_pretrained(
        None,
        config=hf_config,
        state_dict=tensors,
        dtype=state["embed.W_E"].dtype,
        attn_implementation="sdpa",
    )
    return model.eval()
