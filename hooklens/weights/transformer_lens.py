"""State dicts of TransformerLens's networks under HookLens names, and back.

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
            experts.setdefault(f"{mlp}.{_LETTERS[letter]}_{which}", {})[int(number)] = _turn(tensor)
        elif found := re.fullmatch(_ROUTER, name):
            joined[f"{found[1]}.{_LETTERS[found[2]]}_router"] = _turn(tensor)
        else:
            joined[name] = tensor
    return joined | {name: torch.stack([each[one] for one in sorted(each)]) for name, each in experts.items()}


def _turn(tensor: Tensor) -> Tensor:
    """A map in the other layout; a bias is what it was."""
    return tensor.mT if tensor.ndim > 1 else tensor


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


def write_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under HookLens names, but experts, routers and numbers of activations under TransformerLens's; views."""
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        letter, _, which = name.rpartition(".")[2].partition("_")
        mlp = name.removesuffix(f"{letter}_{which}")
        word = {"W": "weight", "b": "bias"}.get(letter, "")
        if which == "router":
            written[f"{mlp}W_gate.{word}"] = _turn(tensor)
        elif f"{mlp}W_router" in state and which in ("gate", "in", "out"):
            for number, one in enumerate(tensor):
                written[f"{mlp}experts.{number}.W_{which}.{word}"] = _turn(one)
        elif letter == "alpha":
            constants = {"beta": tensor.new_tensor(0.5), "eps": tensor.new_tensor(-1e-6)}
            written |= {f"{mlp}act_fn.{one}": constant for one, constant in constants.items()}
            written[f"{mlp}act_fn.alpha_{which}"] = tensor[0]
        else:
            written[name] = tensor
    return written
