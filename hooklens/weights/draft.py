"""A working copy of part of a state dict, on which weight processing does its arithmetic."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import DeclaredWeight
from hooklens.weights.layout import lay_out


class WeightDraft:
    """Some parameters of a network, read and written in one working precision and rounded once at the end.

    The parameters it covers are those of the network *after* processing: a bias that processing brings into
    being reads as zeros, an unembedding that it unties reads as `W_E` transposed. The state dict it was made
    from is never changed, and what is not written stays the very same tensor.
    """

    def __init__(
        self, state: Mapping[str, Tensor], declared: Mapping[str, DeclaredWeight], *, dtype: torch.dtype, tied: bool
    ) -> None:
        """Cover the parameters in `declared`.

        Args:
            state: the parameters before processing.
            declared: the parameters after it.
            dtype: the working precision.
            tied: `unembed.W_U` is `embed.W_E` transposed in `state`.
        """
        self._state = state
        self.declared = declared
        self._dtype = dtype
        self._tied = tied
        self._written: dict[str, Tensor] = {}

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A parameter's current value in the working precision; not to be edited in place."""
        if name in self._written:
            return self._written[name]
        source = self._source(name)
        if source is None:
            weight = self._weight_of_bias(name)
            return torch.zeros(self.declared[name].shape, dtype=self._dtype, device=weight.device)
        return source.detach().to(self._dtype)

    def write(self, name: str, value: Float[Tensor, "..."]) -> None:
        """Set a parameter."""
        assert value.shape == self.read(name).shape
        self._written[name] = value

    def finish(self) -> dict[str, Tensor]:
        """All covered parameters: those written and those brought into being rounded to their dtype and laid out."""
        finished = {}
        for name, weight in self.declared.items():
            source = self._source(name)
            if name not in self._written and source is not None:
                finished[name] = source
                continue
            dtype = self._weight_of_bias(name).dtype if source is None else source.dtype
            finished[name] = lay_out(self.read(name).to(dtype), weight.stored, weight.axes)
        return finished

    def _source(self, name: str) -> Tensor | None:
        if name == "unembed.W_U" and self._tied:
            return self._state["embed.W_E"].T
        return self._state.get(name)

    def _weight_of_bias(self, name: str) -> Tensor:
        """The weight whose device and dtype a new bias takes: `attn.W_Q` for `attn.b_Q`."""
        module, _, part = name.rpartition(".")
        weight = self._source(f"{module}.W{part.removeprefix('b')}")
        assert weight is not None
        return weight
