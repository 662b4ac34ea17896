"""Models of transformers in memory, read and built."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.adapters.choice import find_family
from hooklens.adapters.conversion import HubModel, MemoryTensors, TensorSource, is_of_adapter
from hooklens.adapters.families import load_families
from hooklens.adapters.files.companions import check_generation_config
from hooklens.adapters.layout import to_hub
from hooklens.adapters.wrapping import untie_config, unwrap_config
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names
from hooklens.optional import import_package
from hooklens.weights.quantised import is_quantised_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hooklens.adapters.lora import LoraAdapter

_LORA = "hooklens.adapters.lora"


def read_hf_model(hf_model: "PreTrainedModel") -> tuple[HookedConfig, dict[str, Tensor]]:
    """The config and parameters of a transformers model in memory.

    Parameters share the model's memory wherever the layout allows: all but the queries, keys and values of a
    fused tensor with several key-value heads, and those that adapters of PEFT in the model are added to.

    Raises:
        UnsupportedModelError: the architecture or a config value is not implemented, or an adapter is of a kind that is
            not.
        CheckpointError: the tensors are not those that the config promises, are quantised, or hold no values.
    """
    where, state = type(hf_model).__name__, hf_model.state_dict()
    adapters: list[LoraAdapter] = []
    if any(map(is_of_adapter, state)):
        hf_model, state, adapters = import_package(_LORA).take_adapters(hf_model)
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} of {len(state)} tensors hold no values (device 'meta'): {join_names(empty)}. The "
            "model was made without weights, or they are offloaded: load it without device_map, or give its name or "
            "folder to HookedCausalLM.from_pretrained"
        )
    quantised = [name for name, parameter in hf_model.named_parameters() if is_quantised_tensor(parameter)]
    if quantised:
        raise CheckpointError(
            f"{where}: {len(quantised)} of {len(state)} tensors are quantised: {join_names(quantised)}, and read from "
            "files only: HookedCausalLM.from_pretrained(folder, quantize='keep') takes over those of bitsandbytes, "
            "quantize='int8' or 'int4' makes others; transformers' hf_model.dequantize() gives plain ones"
        )
    config = _plain(hf_model.config.to_dict())
    tensors: TensorSource = MemoryTensors(state)
    if adapters:
        config, tensors = _merge(config, tensors, adapters, where=where)
    model = HubModel(config, tensors, where=where)
    return model.cfg, dict(model.tensors())


def _merge(
    config: dict[str, Any], tensors: TensorSource, adapters: "list[LoraAdapter]", *, where: str
) -> tuple[dict[str, Any], TensorSource]:
    """A model's config and tensors with adapters added."""
    inside = unwrap_config(config, load_families())
    family = find_family(inside, load_families(), where=where)
    cfg = family.read_config(inside, where=where, warn=False)
    merged = import_package(_LORA).MergedTensors(tensors, adapters, family, cfg, where=where)
    return untie_config(config) if merged.unties else config, merged


def read_hf_generation_config(hf_model: "PreTrainedModel") -> dict[str, Any]:
    """The settings of generation of a transformers model, as `generation_config.json` would hold them.

    Raises:
        CheckpointError: end tokens or padding token are no token ids.
    """
    config = getattr(hf_model, "generation_config", None)
    if config is None:
        return {}
    return check_generation_config(_plain(config.to_diff_dict()), where=f"{type(hf_model).__name__}.generation_config")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON, so that dtypes and the like are plain values as in a file."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def choose_attention(cfg: HookedConfig) -> str | None:
    """What transformers is to attend with, whatever a config came with: the best that computes the network.

    Returns:
        None, which is `sdpa`, or where transformers has none for the architecture `eager`; or `"eager"` where scores
        have a soft cap: `sdpa` leaves it out, and transformers before 5.21 takes `sdpa` all the same.
    """
    return None if cfg.attn_softcap is None else "eager"


def build_hf_model(
    cfg: HookedConfig,
    state: Mapping[str, Tensor],
    *,
    transforms: Sequence[str] = (),
    generation_config: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """The transformers model with the same logits, in eval mode.

    It attends as `choose_attention` says. Its parameters share memory with `state` where the layout allows.

    Args:
        cfg: the network.
        state: its parameters under HookLens names; a tied `unembed.W_U` may be left out.
        transforms: the weight-processing steps it has been through, for the advice where it cannot be written.
        generation_config: settings of generation, as in `generation_config.json`; None or empty: what the config gives.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`.
    """
    transformers = import_package("transformers")
    config, tensors = to_hub(cfg, state, transforms=transforms)
    dtype = state["embed.W_E"].dtype
    hf_config = transformers.AutoConfig.for_model(**config)
    model_class = getattr(transformers, config["architectures"][0])
    model: PreTrainedModel = model_class.from_pretrained(
        None,
        config=hf_config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=choose_attention(cfg),
        # The product that runs all experts at once refuses float64.
        experts_implementation="eager" if dtype == torch.float64 else None,
    )
    if generation_config:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(generation_config))
    return model.eval()
