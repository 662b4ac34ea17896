"""The parameters of a network in float64, by the names and the layout that they have in memory."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from hooklens.model.parts.part import Part
from hooklens.model.parts.quantised import dense_weight, is_quantised
from hooklens.model.parts.stacked import StackedLinear

# What a part of a known kind may be made of, and nothing put around it.
_PLAIN = (nn.Linear, nn.Embedding, StackedLinear)


class ExplicitWeights:
    """Parameters by name, widened when they are read: a large network is not copied as a whole.

    Quantised ones are what they are dequantised.

    Args:
        network: whose.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters: Mapping[str, Tensor] = {
            name: parameter.detach() for name, parameter in network.named_parameters(remove_duplicate=False)
        }
        self._quantised = {f"{name}.weight": one for name, one in network.named_modules() if is_quantised(one)}

    def find(self, name: str) -> Tensor | None:
        """A parameter, or None where the network has none of that name."""
        parameter = self._parameters.get(name)
        return None if parameter is None else parameter.double()

    def __getitem__(self, name: str) -> Tensor:
        linear = self._quantised.get(name)
        return (self._parameters[name] if linear is None else dense_weight(linear)).double()

    def apply(self, linear: str, x: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out_of"]:
        """`x W^T + b` of a stored linear map."""
        made, bias = x @ self[f"{linear}.weight"].T, self.find(f"{linear}.bias")
        return made if bias is None else made + bias

    def of_head(self, linear: str, head: int, d_head: int) -> tuple[Float[Tensor, "d_head into"], Tensor | float]:
        """One head's rows of a stored map that makes heads, and its part of the bias."""
        rows = slice(head * d_head, (head + 1) * d_head)
        bias = self.find(f"{linear}.bias")
        return self[f"{linear}.weight"][rows], 0.0 if bias is None else bias[rows]

    def to_stream(self, linear: str, head: int, d_head: int) -> Float[Tensor, "d_model d_head"]:
        """One head's columns of a stored map that reads heads."""
        return self[f"{linear}.weight"][:, head * d_head : (head + 1) * d_head]


def why_unknown(part: Part | nn.Module, kinds: tuple[type[Part], ...]) -> str | None:
    """Why what a part computes has no definition here; None where it has."""
    if type(part) not in kinds:
        return f"a part of one's own stands there ({type(part).__name__})"
    for name, module in part.named_modules():
        if isinstance(module, _PLAIN) and type(module) not in _PLAIN and not is_quantised(module):
            return f"a {type(module).__name__} stands at {name}"
        if isinstance(module, nn.Linear) and (module._forward_hooks or module._forward_pre_hooks):
            return f"hooks of torch's own are attached to {name}"
    replaced = [
        weight.module
        for inside in part.modules()
        if isinstance(inside, Part)
        for weight, _ in inside.weight_table()
        if weight.module is not None
        and type(inside._modules.get(weight.module)) not in _PLAIN
        and not is_quantised(inside._modules.get(weight.module))
    ]
    if replaced:
        return f"something stands in the place of {', '.join(sorted(set(replaced)))}"
    return None
