"""`SVDInterpreter` of 2.x: singular directions of weights, read in vocabulary space."""

from typing import Any

import torch
from torch import Tensor

OUTPUT_EMBEDDING, VECTOR_TYPES = "unembed.W_U", ["OV", "w_in", "w_out"]


class SVDInterpreter:
    """Reads the weights of a model."""

    def __init__(self, model: Any) -> None:
        self.model, self.cfg = model, model.cfg

    def get_singular_vectors(
        self, vector_type: str, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> Tensor:
        """The logits of the first singular directions that a map writes or reads, `[d_vocab 1 num_vectors]`."""
        if vector_type not in VECTOR_TYPES:
            raise ValueError(f"Vector type must be in {VECTOR_TYPES}, instead got {vector_type}")
        n_layers, n_heads = self.cfg.n_layers, self.cfg.n_heads
        assert 0 <= layer_index < n_layers, f"Layer index must be between 0 and {n_layers - 1} but got {layer_index}"
        if vector_type == "OV":
            assert head_index is not None, "Head index optional only for w_in and w_out, got OV"
            assert 0 <= head_index < n_heads, f"Head index must be between 0 and {n_heads - 1} but got {head_index}"
            directions = self.model.OV[layer_index, head_index].Vh.T
        else:
            matrix = self.model.W_in[layer_index].T if vector_type == "w_in" else self.model.W_out[layer_index]
            norm = self.model.state_dict().get(f"blocks.{layer_index}.ln2.w")
            directions = torch.linalg.svd(matrix * norm if vector_type == "w_in" and norm is not None else matrix)[2]
        vectors: Tensor = (directions[:num_vectors].float() @ self.model.W_U).T[:, None]
        return vectors
