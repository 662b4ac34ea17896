"""What the heads of a loaded state project and write, to hold against a transformers module."""

from collections.abc import Mapping

import torch
from torch import Tensor


def project_heads(x: Tensor, state: Mapping[str, Tensor], layer: int, part: str) -> Tensor:
    """Queries, keys or values `[batch pos head d_head]` of a stream `x [batch pos d_model]`; `part` is Q, K or V."""
    projected = torch.einsum("bpm,nmh->bpnh", x, state[f"blocks.{layer}.attn.W_{part}"])
    return projected + state.get(f"blocks.{layer}.attn.b_{part}", torch.zeros(()))


def write_heads(z: Tensor, state: Mapping[str, Tensor], layer: int) -> Tensor:
    """What heads with the values `z [batch pos head d_head]` write into the stream, `[batch pos d_model]`."""
    written = torch.einsum("bpnh,nhm->bpm", z, state[f"blocks.{layer}.attn.W_O"])
    return written + state.get(f"blocks.{layer}.attn.b_O", torch.zeros(()))
