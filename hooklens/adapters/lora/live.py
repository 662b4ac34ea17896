"""Adapters inside of a model in memory, as PEFT puts them there: the model's own weights, and what is added to them."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hooklens.adapters.conversion import MemoryTensors
from hooklens.adapters.lora.adapter import LoraAdapter, read_adapter
from hooklens.adapters.lora.settings import read_settings
from hooklens.errors import CheckpointError, UnsupportedModelError, join_names
from hooklens.optional import import_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# PEFT's layers around the model's own, and what it adds beside them.
_AROUND = re.compile(r"\.(base_layer|original_module)(?=\.)")
_BESIDE = re.compile(r".*\.(lora_[A-Za-z_]+|modules_to_save)\..*")


def take_adapters(model: "PreTrainedModel | nn.Module") -> tuple[Any, dict[str, Tensor], list[LoraAdapter]]:
    """The transformers model inside of one with adapters, its own weights, and the adapters that act in it.

    Nothing of it is changed, and tensors share its memory.

    Args:
        model: a `PeftModel`, or the model that it is around.

    Raises:
        CheckpointError: adapters are merged into the weights already, act in some layers only, or with another scale
            than their config says.
        UnsupportedModelError: there is an adapter of another type, or of a kind that is not implemented.
    """
    peft, where = import_package("peft"), type(model).__name__
    inside: Any = model
    # `PeftModel` is around a tuner, and that around the model.
    while _is_of_peft(inside):
        inside = inside.get_base_model() if hasattr(inside, "get_base_model") else inside.model
    # What is in memory acts as the PEFT that is there has it, whichever one wrote the file that it came from.
    configs = {
        name: {**_plain(config), "peft_version": peft.__version__} for name, config in inside.peft_config.items()
    }
    for name, config in configs.items():
        read_settings(config, where=f"{where}, adapter {name!r}")
    status = peft.get_model_status(inside)
    if status.merged_adapters:
        raise CheckpointError(
            f"{where}: adapters are merged into the weights already ({status.merged_adapters}); take them out, "
            "model.unmerge_adapter(), or take the plain model, model.merge_and_unload()"
        )
    if "irregular" in (status.enabled, status.active_adapters):
        raise CheckpointError(
            f"{where}: adapters act in some layers and not in others; model.set_adapter(...) and "
            "model.enable_adapter_layers() make them act in all"
        )
    state = {_AROUND.sub("", name): one for name, one in inside.state_dict().items() if not _BESIDE.fullmatch(name)}
    adapters = []
    for name in status.active_adapters if status.enabled else ():
        tensors = peft.get_peft_model_state_dict(inside, adapter_name=name, save_embedding_layers=False)
        adapters.append(read_adapter(configs[name], MemoryTensors(tensors), where=f"{where}, adapter {name!r}"))
        _check_scales(inside, name, adapters[-1])
    return inside, state, adapters


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)


def _plain(config: Any) -> Mapping[str, Any]:
    """A config of PEFT's as its file would hold it."""
    fields: Mapping[str, Any] = json.loads(
        json.dumps(config.to_dict(), default=lambda one: sorted(one) if isinstance(one, set) else str(one))
    )
    return fields


def _check_scales(model: nn.Module, name: str, adapter: LoraAdapter) -> None:
    """Refuse an adapter that somebody has scaled since it was made, as no config tells."""
    scaled = []
    for path, module in model.named_modules():
        scale = getattr(module, "scaling", None)
        if not _is_of_peft(module) or not isinstance(scale, Mapping) or name not in scale:
            continue
        parameter = getattr(module, "parameter_name", None)
        key = _AROUND.sub("", f"{path}.").removesuffix(".") + (f".{parameter}" if parameter else "")
        if scale[name] != adapter.settings.scale_of(key):
            scaled.append(key)
    if scaled:
        raise UnsupportedModelError(
            f"{adapter.where}: in {len(scaled)} modules its scale is not that of its config: {join_names(scaled)}; "
            "set it back, or merge with peft, model.merge_and_unload()"
        )
