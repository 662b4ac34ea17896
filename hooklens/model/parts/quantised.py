"""Linear maps whose weights are quantised, and what they multiply with, as plain numbers.

Such a map is the module of the library that reads the format, in the place of a projection and with its call: an
`nn.Linear` whose weight is a tensor of torchao's, or a linear map of bitsandbytes. What no library multiplies with to
the bit is a `ScaledLinear`. Those of experts stand side by side
in a `QuantisedStack`. A network that holds one has imported its library; nothing of these is imported here before.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooklens.model.parts.scaled import ScaledLinear
from hooklens.model.parts.stacked import QuantisedStack
from hooklens.optional import import_package
from hooklens.weights.quantised import BITSANDBYTES, TORCHAO, is_quantised_tensor, package_of


class UnevenLinear(nn.Linear):
    """A linear map of bitsandbytes' 4-bit numbers whose rows are no whole blocks of them.

    On a CPU its own map computes as if each row began with a new block (version 0.50.2). Here the numbers are
    dequantised as one row, as they were quantised.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input W^T + b`."""
        return F.linear(input, dense_weight(self), self.bias)


def is_quantised(module: nn.Module | None) -> bool:
    """Whether a module is a linear map with a quantised weight, or a stack of such."""
    weight = None if module is None else module.__dict__["_parameters"].get("weight")
    if weight is None:
        return isinstance(module, QuantisedStack)
    if is_quantised_tensor(weight):
        return True
    # A pickle of one of bitsandbytes' weights is a plain parameter that has all of its attributes.
    is_theirs = package_of(module) == BITSANDBYTES or isinstance(module, UnevenLinear | ScaledLinear)
    return is_theirs and not weight.is_floating_point()


def quantised_maps(network: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a network whose weights are quantised, by name; those of a stack one by one."""
    return {
        name: module
        for name, module in network.named_modules()
        if is_quantised(module) and not isinstance(module, QuantisedStack)
    }


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight `[out, in]` of a linear map; of a quantised one what it multiplies with, a copy in plain numbers.

    That of a stack of quantised maps is `[expert, out, in]`.
    """
    if isinstance(linear, QuantisedStack):
        return torch.stack([dense_weight(one) for one in linear.maps])
    weight: Any = linear.weight
    if not is_quantised(linear):
        return weight  # type: ignore[no-any-return]
    with torch.no_grad():
        if isinstance(linear, ScaledLinear):
            return linear.dequantise()
        dense = weight.dequantize() if package_of(weight) == TORCHAO else _read_bitsandbytes(linear)
        return dense.to(compute_dtype(linear))


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """The dtype in which a quantised linear map computes, that of its network."""
    said = getattr(linear, "compute_dtype", None)
    if isinstance(said, torch.dtype):
        return said
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.dtype if weight.is_floating_point() else torch.float32


def set_compute_dtype(linear: nn.Module, dtype: torch.dtype) -> None:
    """Have a quantised linear map compute in a dtype: what is stored of its weight stays as it is."""
    linear.compute_dtype = dtype  # type: ignore[assignment]
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        state.dtype = dtype


def describe_maps(maps: dict[str, nn.Module]) -> str:
    """Quantised maps in words: how many, in which way or of which library, and the first of them."""
    ways = ", ".join(sorted(set(map(_way_of, maps.values()))))
    return f"the weights of {len(maps)} linear maps are quantised ({ways}), {next(iter(maps))!r} first"


def _way_of(linear: nn.Module) -> str:
    if isinstance(linear, ScaledLinear):
        return f"{linear.kind} with scales"
    return TORCHAO if package_of(linear.weight) == TORCHAO else BITSANDBYTES


def _read_bitsandbytes(linear: Any) -> Tensor:
    """What bitsandbytes keeps: 4-bit numbers with their state, or int8 rows whose scales move into a state in use."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if isinstance(linear, UnevenLinear):
            state = copy.copy(state)
            state.shape = torch.Size((1, state.shape.numel()))
        dense: Tensor = import_package(BITSANDBYTES).functional.dequantize_4bit(weight.data, state)
        return dense.view(linear.out_features, linear.in_features)
    held = weight if getattr(weight, "SCB", None) is not None else linear.state
    rows, scales = held.CB.float(), held.SCB.float() / 127
    made: Tensor = rows * scales[:, None]
    return made
