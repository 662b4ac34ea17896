"""Quantised projections, made while a model is loaded: one weight at a time is dense, of experts those of one name.

| `quantize=` | library | a weight is stored as |
|---|---|---|
| `"int8"` | torchao | int8 numbers, with a scale for each output |
| `"int4"` | bitsandbytes | 4-bit numbers that index the NF4 table, with a scale for each 64 of them |
| `"keep"` | torchao | int8 rows that the checkpoint holds |
| `"keep"` | bitsandbytes | its 4-bit blocks that the checkpoint holds |
| `"keep"` | none | other numbers and scales that the checkpoint holds: GPTQ, AWQ, fp8, mxfp4, compressed-tensors |

NF4 is that of Dettmers et al. 2023 ("QLoRA"). All are weight-only, on any device: what a map computes is linear in its
input, as whatever takes a layer apart into heads and directions needs. So a checkpoint of bitsandbytes' 8 bits, which
have this layout, runs on torchao's: bitsandbytes' own kernels round the inputs of such a map to 8 bits, too.

What the last row names is computed with by a `ScaledLinear`, which dequantises at each call. transformers' kernels for
fp8 run on GPUs alone, and round inputs to fp8; those of GPTQ and AWQ (gptqmodel 7.7) ask for torch 2.14; the package
compressed-tensors (0.20) has no linear map that multiplies with packed numbers; torchao's tensor for groups holds 4
bits in a byte, and in bfloat16 it rounds the scales first, so its numbers are not those of the plain model.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooklens.adapters import Kept, QuantisedWeight
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import InputError, MissingDependencyError
from hooklens.model.parts.quantised import UnevenLinear, set_compute_dtype
from hooklens.model.parts.scaled import ScaledLinear
from hooklens.model.parts.stacked import QuantisedStack
from hooklens.model.placement.placement import Placement
from hooklens.optional import import_package
from hooklens.weights.layout import stored_view

Quantisation = Literal["int8", "int4", "keep"]
Value = Tensor | nn.Module

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NF4_BLOCK = 64
# Outputs of maps that choose and weigh experts.
_SCORES = (("expert",), ("one",))
_WAY_OUT = "leave quantize out to load plain weights"


def check_quantisation(kind: Quantisation, dtype: torch.dtype) -> None:
    """Refuse what cannot be quantised before a weight is read.

    Raises:
        InputError: a dtype in which the libraries do not compute.
        MissingDependencyError: the library is not installed, or goes with another torch.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"quantize={kind!r} with dtype {dtype}: quantised maps compute in float32, float16 or bfloat16; give one "
            f"of these as dtype, or {_WAY_OUT}"
        )
    if kind != "keep":
        _library(_LIBRARIES[kind])


def quantise_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    cfg: HookedConfig,
    kind: Literal["int8", "int4"],
    *,
    device: torch.device | str | Placement,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Value]]:
    """Weights by name, those of the projections of attention, MLPs and experts as quantised linear maps.

    Of experts that lie in one tensor, that tensor is dense beside what is made of it.

    Args:
        tensors: names and weights in their logical shapes.
        cfg: the network.
        kind: how.
        device: where the maps are to be, and are quantised: all of them, or each part.
        dtype: in which they compute; weights are brought to it before they are quantised.
    """
    make = _MAKERS[kind]
    for name, tensor in tensors:
        declared = cfg.description.weights.get(name)
        if declared is None or not is_projection(declared):
            yield name, tensor
            continue
        stored, place = stored_view(tensor.detach(), declared.stored, declared.axes), _place_of(name, device)

        def make_map(weight: Tensor, place: torch.device = place) -> nn.Module:
            return make(weight.to(device=place, dtype=dtype).contiguous(), dtype)

        yield name, QuantisedStack(map(make_map, stored)) if is_stacked(declared) else make_map(stored)


def build_kept(
    tensors: Iterable[tuple[str, Tensor | Kept]],
    *,
    device: torch.device | str | Placement,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Value]]:
    """Weights by name, those that a checkpoint holds quantised as linear maps that compute with what it holds."""
    for name, value in tensors:
        if isinstance(value, Tensor):
            yield name, value
            continue
        place = _place_of(name, device)

        def keep(weight: QuantisedWeight, place: torch.device = place) -> nn.Module:
            return _KEEPERS[weight.layout](weight, place, dtype)

        yield name, keep(value) if isinstance(value, QuantisedWeight) else QuantisedStack(map(keep, value))


def _place_of(name: str, device: torch.device | str | Placement) -> torch.device:
    return device.of_weight(name) if isinstance(device, Placement) else torch.device(device)


def is_projection(weight: DeclaredWeight) -> bool:
    """Whether a weight is that of a linear map inside a block, or those of all experts there.

    Maps to a score for each expert, or to one gate, are none: their few numbers say what is computed at all.
    """
    is_map = weight.parameter.startswith("blocks.") and weight.parameter.endswith(".weight")
    return is_map and (is_stacked(weight) or (len(weight.stored) == 2 and weight.stored[0] not in _SCORES))


def is_stacked(weight: DeclaredWeight) -> bool:
    """Whether a weight is those of all experts."""
    return len(weight.stored) == 3


def _make_int8(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A linear map of torchao's, without bias: an `nn.Linear` whose weight is a tensor of its."""
    torchao = _library("torchao").quantization
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    whole = nn.Sequential(linear)
    torchao.quantize_(whole, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    # Texts for printing, which cannot be pickled, are put on the module; the weight alone is taken.
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    quantised = whole[0].weight
    assert isinstance(quantised, nn.Parameter)
    quantised.requires_grad = False
    made.weight = quantised
    set_compute_dtype(made, dtype)
    return made


def _make_int4(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A linear map of bitsandbytes of 4 bits, without bias."""
    linear = _empty_4bit(weight.shape[0], weight.shape[1], _NF4_BLOCK, dtype)
    nn4 = _library("bitsandbytes").nn
    held = nn4.Params4bit(
        weight, requires_grad=False, blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4", module=linear
    )
    # This is when it is quantised.
    linear.weight = held.to(weight.device)
    set_compute_dtype(linear, dtype)
    return linear


def _keep_4bit(weight: QuantisedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The linear map of bitsandbytes that computes with 4-bit numbers as they lie in a checkpoint."""
    library, kind = _library("bitsandbytes"), weight.settings["kind"]
    blocksize, shape = weight.settings["blocksize"], torch.Size(weight.shape)
    linear = _empty_4bit(*weight.shape, blocksize, dtype)
    state = library.functional.QuantState(
        absmax=weight.tensors["absmax"].to(device),
        shape=shape,
        code=weight.tensors["quant_map"].to(device),
        blocksize=blocksize,
        quant_type=kind,
        dtype=dtype,
    )
    linear.weight = library.nn.Params4bit(
        weight.tensors["entries"].to(device).view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=False,
        quant_type=kind,
        module=linear,
        bnb_quantized=True,
    )
    return linear


def _keep_int8(weight: QuantisedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The linear map of torchao that computes with int8 rows as they lie in a checkpoint."""
    # Made of zeros in float32, the dtype of the scales.
    linear = _make_int8(torch.zeros(weight.shape, dtype=torch.float32, device=device), dtype)
    stored = list(stored_tensors(linear.weight))
    (rows,) = (one for one in stored if one.dtype == torch.int8 and one.shape == weight.shape)
    (scales,) = (one for one in stored if one.is_floating_point() and one.numel() == weight.shape[0])
    rows.copy_(weight.tensors["entries"])
    scales.copy_(weight.tensors["scales"].reshape(scales.shape))
    return linear


def _keep_scaled(weight: QuantisedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The linear map that computes with numbers and scales as they lie in a checkpoint."""
    tensors = {role: tensor.to(device) for role, tensor in weight.tensors.items()}
    linear = ScaledLinear(weight.settings["kind"], d_in=weight.shape[1], **tensors)
    set_compute_dtype(linear, dtype)
    return linear


def stored_tensors(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that one of torchao's is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(tensor, name))


def _empty_4bit(d_out: int, d_in: int, blocksize: int, dtype: torch.dtype) -> nn.Module:
    """A linear map without bias for 4-bit numbers of bitsandbytes, which has none yet."""
    with torch.device("meta"):
        if d_in % blocksize:
            return UnevenLinear(d_in, d_out, bias=False)
        linear: nn.Module = _library("bitsandbytes").nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=dtype)
    # On some processors the first call without gradients would turn the weight into another layout, whose kernel rounds
    # inputs to bfloat16: a call that asks for gradients would then give other numbers.
    linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return linear


_LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes"}
_MAKERS: dict[str, Callable[[Tensor, torch.dtype], nn.Module]] = {"int8": _make_int8, "int4": _make_int4}
_KEEPERS: dict[str, Callable[[QuantisedWeight, torch.device, torch.dtype], nn.Module]] = {
    "int8 rows": _keep_int8,
    "4-bit blocks": _keep_4bit,
    "scaled": _keep_scaled,
}


def _library(name: str) -> ModuleType:
    """A library that quantises, with the modules that are used of it.

    Raises:
        MissingDependencyError: it is not installed, or goes with another version of torch.
    """
    try:
        if name == "torchao":
            import_package("torchao.quantization")
        return import_package(name)
    except MissingDependencyError:
        raise
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise MissingDependencyError(
            f"the package {name!r} is installed and cannot be imported ({type(error).__name__}: {error}): it belongs "
            f"to another version of torch than {torch.__version__}. Install the one that goes with it"
        ) from error
