"""State dicts of TransformerLens's networks under HookLens names.

Names and shapes are HookLens's, the field's, but for these:

- Masks, rotary tables and constants of activations are buffers, and no weights; nor is the table of positions that a
  network with linear biases has there and does not read.
- Of grouped queries, the maps of the key-value heads are `_W_K`, `_W_V`, `_b_K` and `_b_V`.
- The bias `b_in` of a gated MLP stands behind the product of its halves, so it moves into `b_out`.
- Experts are modules of their own with linear maps in PyTorch's layout, and the router is called `W_gate`.
- Trained numbers of an activation are scalars of a module, `mlp.act_fn`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hooklens.config import AlibiPositions, HookedConfig

_BUFFERS = r"(blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)|blocks\.\d+\.mlp\.act_fn\.(beta|eps))"
_SHARED_HEADS = r"\.attn\._([Wb]_[KV])$"
_EXPERT = r"(blocks\.\d+\.mlp)\.experts\.(\d+)\.W_(gate|in|out)\.(weight|bias)"
_ROUTER = r"(blocks\.\d+\.mlp)\.W_gate\.(weight|bias)"
_OWN_LETTER = {"weight": "W", "bias": "b"}


def read_state(state: Mapping[str, Tensor], cfg: HookedConfig) -> dict[str, Tensor]:
    """Tensors under HookLens names and in its shapes; names that are in neither library stay as they are.

    Args:
        state: the tensors of a state dict of TransformerLens's.
        cfg: the network.
    """
    read: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if re.fullmatch(_BUFFERS, name) or (name == "pos_embed.W_pos" and isinstance(cfg.positions, AlibiPositions)):
            continue
        if found := re.fullmatch(_EXPERT, name):
            mlp, number, which, letter = found.groups()
            experts.setdefault(f"{mlp}.{_OWN_LETTER[letter]}_{which}", {})[int(number)] = tensor.mT
        elif found := re.fullmatch(_ROUTER, name):
            read[f"{found[1]}.{_OWN_LETTER[found[2]]}_router"] = tensor.mT if tensor.ndim > 1 else tensor
        elif ".mlp.act_fn." in name:
            read[name.replace(".act_fn.", ".")] = tensor.reshape(1)
        else:
            read[re.sub(_SHARED_HEADS, r".attn.\1", name)] = tensor
    for name, each in experts.items():
        read[name] = torch.stack([each[number] for number in sorted(each)])
    if cfg.gated_mlp:
        _move_input_biases(read)
    return read


def _move_input_biases(state: dict[str, Tensor]) -> None:
    """Put what `b_in` writes to the stream into `b_out`, in the sums of float64."""
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.mlp\.b_in", name)]:
        mlp = name.removesuffix(".b_in")
        W_out, b_out = (state.get(f"{mlp}.{one}") for one in ("W_out", "b_out"))
        b_in = state[name]
        if W_out is None or W_out.ndim != 2 or b_out is None or b_in.shape != W_out.shape[:1]:
            # What does not fit together is told of with all other tensors.
            continue
        del state[name]
        if bool(b_in.any()):
            state[f"{mlp}.b_out"] = (b_out.double() + b_in.double() @ W_out.double()).to(b_out.dtype)
