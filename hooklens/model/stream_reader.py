"""The end of a model apart from the rest of it: what reads a stream as logits."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.model.parts.part import is_plain
from hooklens.precision import widen

if TYPE_CHECKING:
    from hooklens.model.decoder import Decoder


class StreamReader:
    """The final norm and the unembedding of a model, which any stream can be read by; hook points do not fire.

    It keeps these two alone: the model's blocks may be let go of.

    Args:
        model: the model.
    """

    def __init__(self, model: "Decoder") -> None:
        places = model.device_map
        self._norm, self._unembed = model.ln_final, model.unembed
        self._norm_device = places.get("ln_final", model.device)
        self._unembed_device = places["unembed"]
        self._dtype = model.dtype
        self.n_outputs = model.cfg.d_vocab_out

    def read(self, stream: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_vocab_out"]:
        """What the model predicts from a stream as if it ended there: log-probabilities in nats, at least float32."""
        return torch.log_softmax(self.unembed(self.normalize(stream)), -1)

    def normalize(self, stream: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What the unembedding reads of a stream, on its device."""
        last = stream.to(self._norm_device, self._dtype)
        normed = last if self._norm is None else self._norm.apply_weights(last)
        return normed.to(self._unembed_device)

    def unembed(
        self, normed: Float[Tensor, "*axes d_model"], outputs: Int[Tensor, " output"] | None = None
    ) -> Float[Tensor, "*axes output"]:
        """Logits of what `normalize` gave, at least float32.

        Args:
            normed: the output of the final norm.
            outputs: some of the outputs; None: all.
        """
        logits: Tensor = self._unembed.final_logits(normed, outputs)
        return widen(logits)

    @property
    def takes_parts(self) -> bool:
        """Whether some of the logits are computed alone; where something stands around `W_U`, all are, each time."""
        proj = self._unembed._modules.get("proj")
        return proj is None or is_plain(proj)
