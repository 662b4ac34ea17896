"""The adapters beside a model's weights: what a model knows of them, and putting them there."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooklens.adapters import Checkpoint
from hooklens.axes import HookSite, declare_site
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import InputError, UnsupportedModelError, join_names
from hooklens.hooks import HookPoint
from hooklens.model.decoder import Decoder
from hooklens.model.parameters import ModelWeights
from hooklens.model.parts.adapted import Adapted, AdapterSwitch, adapted_maps, base_map
from hooklens.model.parts.quantised import is_quantised
from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.adapters.lora import LoraAdapter
    from hooklens.adapters.lora.keeping import KeptAdapter, KeptChange
    from hooklens.model.parts.adapted_layers import LoraTensors

# What only adapters need is imported with the first of them.
KEEPING = "hooklens.adapters.lora.keeping"
LAYERS = "hooklens.model.parts.adapted_layers"
DEFAULT_ADAPTER = "default"
"""The name of the only adapter, where none is given: peft's."""

_DESCRIPTION = "what adapters add to the output of {map}: scaled, before the sum"


class KeptAdapters:
    """The adapters beside one model's weights.

    Args:
        cfg: the network of the checkpoint that adapters are made for.
        layers: which of its blocks the model has; None: all.

    Attributes:
        switch: what the maps of the model share.
        by_name: the adapters, in the order in which they were added.
        active: the names of those that act, but for calls inside `disable_adapter()`.
    """

    def __init__(self, cfg: HookedConfig, layers: Sequence[int] | None = None) -> None:
        self.cfg, self.layers = cfg, layers
        self.switch = AdapterSwitch()
        self.by_name: dict[str, KeptAdapter] = {}
        self.active: tuple[str, ...] = ()


class PinnedWeights(ModelWeights):
    """A network's weights with what the adapters make of them that acted when this was asked for."""

    def __init__(self, decoder: Decoder, kept: KeptAdapters) -> None:
        super().__init__(decoder)
        self._pin = partial(kept.switch.only, acting(kept))

    def __getitem__(self, name: str) -> Tensor:
        with self._pin():
            return super().__getitem__(name)


def acting(kept: KeptAdapters) -> tuple[str, ...]:
    """The adapters that act in what the thread does now."""
    return kept.switch.chosen(kept.active)


def take_apart(
    adapters: "Mapping[str, LoraAdapter]", checkpoint: Checkpoint, layers: Sequence[int] | None
) -> "dict[str, KeptAdapter]":
    """Adapters as they are kept beside the weights of a checkpoint, of which none has been read.

    Args:
        adapters: by name.
        checkpoint: the checkpoint.
        layers: which of its blocks are taken; None: all.

    Raises:
        CheckpointError: an adapter does not fit the checkpoint.
        UnsupportedModelError: an adapter cannot be kept beside the weights.
        InputError: the weights were processed.
        MissingDependencyError: peft is not installed.
    """
    if not adapters:
        return {}
    import_package("peft")
    refuse_processed(checkpoint.transforms, "merge=False")
    keep = import_package(KEEPING).keep_adapter
    return {name: keep(adapter, checkpoint.cfg, layers) for name, adapter in adapters.items()}


def keep_adapters(
    model: Decoder, adapters: "Mapping[str, KeptAdapter]", cfg: HookedConfig, layers: Sequence[int] | None
) -> None:
    """Keep adapters beside a model's weights; the first of them acts.

    Args:
        model: the model.
        adapters: by name; with none of them nothing happens, but what is said of the checkpoint is remembered.
        cfg: the checkpoint's network.
        layers: which of its blocks the model has; None: all.
    """
    if layers is not None:
        model.__dict__["_checkpoint"] = (cfg, layers)
    if not adapters:
        return
    kept = KeptAdapters(cfg, layers)
    for name, adapter in adapters.items():
        keep(model, kept, name, adapter)
    activate(model, kept, tuple(adapters)[:1])


def refuse_processed(transforms: Sequence[str], what: str) -> None:
    """Refuse adapters beside weights that are no longer those of a checkpoint.

    Args:
        transforms: the weight-processing steps that were done.
        what: is asked for.

    Raises:
        InputError: there were some.
    """
    if transforms:
        raise InputError(
            f"{what}: the weights were processed ({', '.join(transforms)}), and an adapter is made for those of the "
            "checkpoint; keep it beside these, and process what model.merge_adapter() gives"
        )


def keep(model: Decoder, kept: KeptAdapters, name: str, adapter: "KeptAdapter") -> None:
    """Put one more adapter beside the weights."""
    layers = import_package(LAYERS)
    weights = model.cfg.description.weights
    replacing = [
        (weights[weight], tensor, whole.trains)
        for whole in adapter.wholes
        for weight, tensor in whole.tensors.items()
        if whole.trains or not _is_own(model, weights[weight], tensor)
    ]
    if not kept.by_name:
        model.requires_grad_(requires_grad=False)
    shared: dict[tuple[int, torch.dtype, torch.device], nn.Linear] = {}
    with torch.inference_mode(mode=False):
        for change in adapter.changes:
            layer = _layer_at(model, weights[change.weight], kept.switch)
            tensors = _make_parameters(layer, change, adapter, shared)
            layers.show_at(layer, _make_point(model, weights[change.weight]))
            layer.add(name, tensors)
        for weight, tensor, trains in replacing:
            layer = _layer_at(model, weight, kept.switch)
            layers.replace_in(layer, name, weight.parameter.rpartition(".")[2], tensor, trains=trains)
    kept.by_name[name] = adapter.without_values()
    model.__dict__["_adapters"] = kept
    model.name_hook_points()
    activate(model, kept, kept.active)


def own_map(model: Decoder, path: str) -> Any:
    """A map of the model without what is beside it."""
    return base_map(model.get_submodule(path))


def _is_own(model: Decoder, weight: DeclaredWeight, tensor: Tensor) -> bool:
    """Whether a tensor that was saved with an adapter is the model's own.

    Raises:
        UnsupportedModelError: it is not, and takes the place of a tied embedding.
    """
    path, _, role = weight.parameter.rpartition(".")
    own = own_map(model, path)
    if not is_quantised(own):
        held: Tensor = getattr(own, role)
        if torch.equal(held, tensor.to(held)):
            return True
    if model.cfg.tied_unembed and weight.name == "embed.W_E":
        raise UnsupportedModelError(
            f"{weight.name}: an adapter that is to be kept beside the weights brings another tensor, and it takes the "
            "place of an embedding that the unembedding is tied to; merge it into the weights (merge=True)"
        )
    return False


def path_of(weight: DeclaredWeight) -> str:
    """The name of the module that holds a weight."""
    return weight.parameter.rpartition(".")[0]


def _layer_at(model: Decoder, weight: DeclaredWeight, switch: AdapterSwitch) -> Any:
    """The map that a weight, or a bias, is of, with room for adapters beside it."""
    place, _, attribute = path_of(weight).rpartition(".")
    sizes = dict(zip(weight.axes, weight.shape, strict=True))
    out_sizes = {axis: sizes[axis] for axis in _out_axes(weight)}
    return import_package(LAYERS).adapt(model.get_submodule(place), attribute, switch, out_sizes)


def _out_axes(weight: DeclaredWeight) -> tuple[str, ...]:
    """The axes of what a map gives for one input: the rows of its weight, of a table its columns."""
    return weight.stored[-1] if ".table." in weight.parameter else weight.stored[0]


def _make_point(model: Decoder, weight: DeclaredWeight) -> HookPoint:
    """The hook point of a map, which is in the glossary from here on."""
    path, axes = path_of(weight), _out_axes(weight)
    words = path.split(".")
    template = ".".join(["blocks", "{i}", *words[2:]] if words[0] == "blocks" else words)
    site = HookSite(
        template=f"{template}.hook_lora_out",
        axes=("batch", "pos", *axes),
        description=_DESCRIPTION.format(map=weight.name.rpartition(".")[2]),
    )
    declare_site(site)
    return HookPoint(site)


def _make_parameters(
    layer: Adapted,
    change: "KeptChange",
    adapter: "KeptAdapter",
    shared: dict[tuple[int, torch.dtype, torch.device], nn.Linear],
) -> "LoraTensors":
    """An adapter's parameters beside one map; `A` is the same one beside all maps that share it."""
    layers = import_package(LAYERS)
    dtype, device = layers.adapter_dtype(layer), layers.adapter_device(layer)

    def make(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device=device, dtype=dtype, copy=True), requires_grad=False)

    key = (id(change.A), dtype, device)
    if key not in shared:
        shared[key] = layers.make_linear(make(change.A))
    made: LoraTensors = layers.LoraTensors(
        A=shared[key],
        B=make(change.B),
        scale=change.scale,
        rslora=adapter.rslora,
        dropout=adapter.dropout,
        magnitude=None if change.magnitude is None else make(change.magnitude),
        bias=None if change.bias is None else make(change.bias),
    )
    return made


def activate(model: Decoder, kept: KeptAdapters, names: tuple[str, ...]) -> None:
    """Have adapters act, and be trained, and no others.

    Raises:
        InputError: several have a tensor for the same place; nothing has changed.
    """
    maps = adapted_maps(model)
    clashing = [path for path, layer in maps.items() if len([one for one in names if one in layer.replacements]) > 1]
    if clashing:
        raise InputError(
            f"set_adapter: {join_names(names)} each have a tensor of their own for {join_names(clashing)}, of which "
            "only one can be in use; take one of them"
        )
    for layer in maps.values():
        state: Any = layer
        state.set_adapter(list(names))
        for name, one in layer.replacements.items():
            replacement: Any = one
            for parameter in replacement.parameters():
                parameter.requires_grad_(name in names and replacement.trains)
    kept.active = names
