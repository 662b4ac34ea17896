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
from hooklens.config.stream import has_bias

_BUFFERS = r"(^|\.)(attn\.(mask|IGNORE|rotary_sin|rotary_cos|alibi)|mlp\.act_fn\.(beta|eps))$"
_SHARED_HEADS = r"(^|\.)attn\._([Wb]_[KV])$"
_EXPERT = r"(.*\.mlp)\.experts\.(\d+)\.W_(gate|in|out)\.(weight|bias)"
_ROUTER = r"(.*\.mlp)\.W_gate\.(weight|bias)"
_LETTERS = {"weight": "W", "bias": "b"}


def rename(name: str, cfg: HookedConfig) -> str | None:
    """The name of a weight in HookLens, or what was given; None for what the network does not read."""
    if re.search(_BUFFERS, name) or (name == "pos_embed.W_pos" and isinstance(cfg.positions, AlibiPositions)):
        return None
    return re.sub(_SHARED_HEADS, r"\1attn.\2", name).replace(".mlp.act_fn.", ".mlp.")


def read_state(state: Mapping[str, Tensor], cfg: HookedConfig) -> dict[str, Tensor]:
    """Tensors under HookLens names and in its shapes; names that are in neither library stay as they are.

    Args:
        state: the tensors of a state dict of TransformerLens's.
        cfg: the network.
    """
    read = {
        known: tensor.reshape(1) if ".act_fn." in name else tensor
        for name, tensor in join_experts(state).items()
        if (known := rename(name, cfg)) is not None
    }
    move_input_biases(read, cfg)
    return read


def join_experts(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, those of experts and routers under HookLens names; a state dict without such is given back."""
    if not any(re.fullmatch(_EXPERT, name) for name in state):
        return state
    joined: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if found := re.fullmatch(_EXPERT, name):
            mlp, number, which, letter = found.groups()
            experts.setdefault(f"{mlp}.{_LETTERS[letter]}_{which}", {})[int(number)] = tensor.T
        elif found := re.fullmatch(_ROUTER, name):
            joined[f"{found[1]}.{_LETTERS[found[2]]}_router"] = tensor.T
        else:
            joined[name] = tensor
    return joined | {name: torch.stack([each[one] for one in sorted(each)]) for name, each in experts.items()}


def move_input_biases(state: dict[str, Tensor], cfg: HookedConfig) -> None:
    """Put what `b_in` of gated MLPs writes to the stream into `b_out`, summed in float64.

    A network that has a bias `b_in` of its own means another one, and is left as it is.
    """
    if not cfg.gated_mlp or has_bias(cfg, "mlp_in_bias"):
        return
    for name in [name for name in state if re.fullmatch(r"(.*\.)?mlp\.b_in", name)]:
        W_out, b_out = (state.get(name.removesuffix("b_in") + one) for one in ("W_out", "b_out"))
        b_in = state[name]
        if W_out is None or W_out.ndim != 2 or b_out is None or b_in.shape != W_out.shape[:1]:
            # What does not fit together is told of with all other tensors.
            continue
        del state[name]
        if bool(b_in.any()):
            moved = b_out.double() + b_in.double() @ W_out.double()
            state[f"{name.removesuffix('b_in')}b_out"] = moved.to(b_out.dtype)
