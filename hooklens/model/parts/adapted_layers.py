"""The modules that hold adapters: peft's LoRA layers, which compute as `hooklens.model.parts.adapted` says.

Imported with peft, when the first adapter is kept. What a layer has of adapters lies where peft's own code looks for
it: its functions that switch, scale, freeze or save adapters find them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.hooks import HookPoint
from hooklens.model.parts.adapted import Adapted, AdaptedMap, AdaptedTable, AdapterSwitch
from hooklens.model.parts.quantised import compute_dtype, is_quantised
from hooklens.optional import import_package

_layers: Any = import_package("peft.tuners.lora.layer")
_dora: Any = import_package("peft.tuners.lora.dora")
_variants: Any = import_package("peft.tuners.lora.variants")


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """What an adapter adds beside one map.

    Attributes:
        A: the map that reads the input, weight `[rank d_in]`. Several maps may share it: the module, so that it stays
            one wherever torch puts new parameters in the place of old ones.
        B: `[d_out rank]`.
        scale: what their product is multiplied by.
        rslora: the scale is `alpha / sqrt(rank)`.
        dropout: the share of the inputs that training leaves out of what `A` reads.
        magnitude: DoRA's lengths, `[d_out]`; None: plain LoRA.
        bias: what is added, scaled, to the map's bias; None: nothing.
    """

    A: nn.Linear
    B: nn.Parameter
    scale: float
    rslora: bool = False
    dropout: float = 0.0
    magnitude: nn.Parameter | None = None
    bias: nn.Parameter | None = None


class AdaptedLinear(AdaptedMap, _layers.Linear):  # type: ignore[misc]
    """peft's layer of a linear map, plain or quantised.

    Args:
        base_layer: the map.
        switch: the model's.
        out_sizes: sizes of what the map gives, by axis, as its hook point shows it.
    """

    lora_variant: dict[str, Any]

    def __init__(self, base_layer: nn.Module, switch: AdapterSwitch, out_sizes: Mapping[str, int]) -> None:
        _begin(self, base_layer, switch, out_sizes)
        self.is_target_conv_1d_layer = False

    def add(self, name: str, tensors: LoraTensors) -> None:
        """Keep one more adapter, which does not act yet."""
        self.lora_A[name] = tensors.A
        self.lora_B[name] = make_linear(tensors.B, tensors.bias)
        self.lora_dropout[name] = nn.Dropout(tensors.dropout) if tensors.dropout else nn.Identity()
        if tensors.magnitude is not None:
            lengths = _dora.DoraLinearLayer(fan_in_fan_out=False)
            lengths.weight = tensors.magnitude
            self.lora_magnitude_vector[name] = lengths
            self.lora_variant[name] = _variants.DoraLinearVariant()
        _note(self, name, tensors)
        self.lora_A[name].train(self.training)
        self.lora_dropout[name].train(self.training)


class AdaptedEmbedding(AdaptedTable, _layers.Embedding):  # type: ignore[misc]
    """peft's layer of a table of vectors.

    Args:
        base_layer: the table.
        switch: the model's.
        out_sizes: sizes of what the table gives, by axis, as its hook point shows it.
    """

    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, Any]

    def __init__(self, base_layer: nn.Module, switch: AdapterSwitch, out_sizes: Mapping[str, int]) -> None:
        _begin(self, base_layer, switch, out_sizes)

    def add(self, name: str, tensors: LoraTensors) -> None:
        """Keep one more adapter, which does not act yet."""
        self.lora_embedding_A[name] = tensors.A.weight
        self.lora_embedding_B[name] = tensors.B
        # As peft has it: nothing of a table's inputs, which are token ids, is dropped.
        self.lora_dropout[name] = nn.Identity()
        if tensors.magnitude is not None:
            lengths = _dora.DoraEmbeddingLayer(fan_in_fan_out=True)
            lengths.weight = tensors.magnitude
            self.lora_magnitude_vector[name] = lengths
            self.lora_variant[name] = _variants.DoraEmbeddingVariant()
        _note(self, name, tensors)


def _begin(layer: Any, base_layer: nn.Module, switch: AdapterSwitch, out_sizes: Mapping[str, int]) -> None:
    """What peft's layers do when they are made, without an adapter."""
    nn.Module.__init__(layer)
    _layers.LoraLayer.__init__(layer, base_layer)
    layer.fan_in_fan_out = False
    layer._active_adapter = []
    layer.replacements = nn.ModuleDict()
    layer.hook_lora_out = None
    layer.switch, layer.out_sizes = switch, out_sizes
    layer.train(base_layer.training)


def make_linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear map with these parameters."""
    out_of, into = weight.shape
    with torch.device("meta"):
        made = nn.Linear(into, out_of, bias=False)
    made.weight, made.bias = weight, bias  # type: ignore[assignment]
    return made


def _note(layer: Any, name: str, tensors: LoraTensors) -> None:
    rank = tensors.A.out_features
    layer.r[name] = rank
    layer.lora_alpha[name] = tensors.scale * (rank**0.5 if tensors.rslora else rank)
    layer.scaling[name] = tensors.scale
    layer.use_rslora[name] = tensors.rslora
    layer.use_dora[name] = tensors.magnitude is not None
    layer.lora_bias[name] = tensors.bias is not None


class Replacement(nn.Module):
    """What an adapter puts in the place of a map's own weight, bias or both.

    Attributes:
        weight: None: the map's own stays.
        bias: the same.
        trains: they are trained with the adapter.
    """

    trains = True

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def adapt(holder: nn.Module, attribute: str, switch: AdapterSwitch, out_sizes: Mapping[str, int]) -> Adapted:
    """The map that stands somewhere, with room for adapters beside it; it takes its place there.

    Args:
        holder: the module that has it.
        attribute: under which name.
        switch: the model's.
        out_sizes: sizes of what the map gives, by axis, as its hook point shows it.
    """
    own = holder._modules[attribute]
    if isinstance(own, Adapted):
        return own
    assert own is not None
    kind = AdaptedEmbedding if isinstance(own, nn.Embedding) else AdaptedLinear
    made: Adapted = kind(own, switch, out_sizes)
    setattr(holder, attribute, made)
    return made


def show_at(layer: Adapted, point: HookPoint) -> None:
    """Have a layer show what its adapters add."""
    if layer.hook_lora_out is None:
        layer.hook_lora_out = point


def adapter_dtype(layer: Adapted) -> torch.dtype:
    """The dtype that adapters of a layer have: that of its map, and float32 beside half precision, as peft has it."""
    own: Any = layer.base_layer
    found: torch.dtype = compute_dtype(own) if is_quantised(own) else own.weight.dtype
    return torch.float32 if found.itemsize < 4 else found


def adapter_device(layer: Adapted) -> torch.device:
    """Where adapters of a layer lie: with its map."""
    weight: Tensor = layer.base_layer.weight  # type: ignore[assignment]
    return weight.device


def replace_in(layer: Adapted, name: str, role: str, tensor: Tensor, *, trains: bool) -> None:
    """Put a tensor of an adapter in the place of a map's own, once the adapter acts.

    Args:
        layer: the map.
        name: of the adapter.
        role: `"weight"` or `"bias"`.
        tensor: as the map stores it.
        trains: it is trained with the adapter.
    """
    if name not in layer.replacements:
        layer.replacements[name] = Replacement()
    own: Any = layer.base_layer
    dtype = compute_dtype(own) if is_quantised(own) else own.weight.dtype
    placed = tensor.detach().to(device=adapter_device(layer), dtype=dtype, copy=True)
    setattr(layer.replacements[name], role, nn.Parameter(placed, requires_grad=False))
    layer.replacements[name].trains = trains  # type: ignore[assignment]


def read_tensors(layer: Adapted, name: str) -> dict[str, Tensor | None]:
    """What an adapter has beside a map now: `A`, `B`, and where it has them `magnitude` and `bias`."""
    held: Any = layer
    lengths = held.lora_magnitude_vector[name].weight if name in held.lora_magnitude_vector else None
    if isinstance(layer, AdaptedEmbedding):
        found = {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name], "magnitude": lengths}
    else:
        a, b = held.lora_A[name], held.lora_B[name]
        found = {"A": a.weight, "B": b.weight, "magnitude": lengths, "bias": b.bias}
    return {role: None if tensor is None else tensor.detach() for role, tensor in found.items()}


def take_out(holder: nn.Module, attribute: str, layer: Adapted, name: str) -> None:
    """Take an adapter, which does not act, from beside a map; without any the map takes its place again."""
    held: Any = layer
    held.delete_adapter(name)
    held.lora_variant.pop(name, None)
    if name in layer.replacements:
        del layer.replacements[name]
    if not held._get_available_adapters():
        layer.hook_lora_out = None
        if not len(layer.replacements):
            setattr(holder, attribute, layer.base_layer)
