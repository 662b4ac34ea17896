"""Functions that parts are written with: activations by name, linear maps, devices."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.compat.transformer_lens.utilities import _devices
from hooklens.model import activations
from hooklens.model.activations import ACTIVATIONS
from hooklens.model.attention.alibi import alibi_slopes

gelu_new = gelu_fast = gelu_pytorch_tanh = ACTIVATIONS["gelu_tanh"]
solu = ACTIVATIONS["solu"]
vanilla_addmm = torch.addmm
get_best_available_device, move_to_and_update_config = (
    _devices.get_best_available_device,
    _devices.move_to_and_update_config,
)


class XIELU(nn.Module):
    """The xIELU, with its two learned numbers where they start."""

    def __init__(self) -> None:
        super().__init__()
        for name, start in (("alpha_p", 0.8), ("alpha_n", 0.3)):
            self.register_parameter(name, nn.Parameter(Tensor([start]).expm1().log()))

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        learned: dict[str, Any] = self._parameters
        return activations.xielu(x, learned["alpha_p"], learned["alpha_n"])


def xielu(input: Tensor) -> Tensor:
    """The xIELU, with its numbers where they start."""
    start = XIELU().to(input).requires_grad_(requires_grad=False)
    out: Tensor = start(input)
    return out


ActivationFunction = Callable[..., Tensor]
SUPPORTED_ACTIVATIONS: dict[str, ActivationFunction] = {
    "solu": solu, "solu_ln": solu, "gelu_new": gelu_new, "gelu_fast": gelu_fast, "silu": ACTIVATIONS["silu"],
    "relu": ACTIVATIONS["relu"], "gelu": ACTIVATIONS["gelu"], "gelu_pytorch_tanh": gelu_pytorch_tanh, "xielu": xielu,
}  # fmt: skip


def batch_addmm(bias: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`x W + b`."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[-1])


def simple_attn_linear(input: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`x W + b` of each head, one input for all."""
    return torch.einsum("bpm,nmh->bpnh", input, w.to(input.device)) + b.to(input.device)


def complex_attn_linear(input: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`x W + b` of each head, each with an input of its own."""
    return torch.einsum("bpnm,nmh->bpnh", input, w) + b


def create_alibi_slope(n_ctx: int, device: Any = None) -> Tensor:
    """Minus how far each key lies behind each query, `[query key]`."""
    at = torch.arange(n_ctx, device=device)
    return (at[None] - at[:, None]).tril().float()


def create_alibi_bias(n_heads: int, n_ctx: int, device: Any = "cpu") -> Tensor:
    """What linear biases add to the scores of keys that are seen, `[head query key]`."""
    return alibi_slopes(n_heads, device)[:, None, None] * create_alibi_slope(n_ctx, device)


sys.modules[f"{__name__}.devices"] = _devices
for _name in ("activation_functions", "addmm", "attention"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
