"""Which parameters a configuration has, with their logical shapes, and whether a state dict holds them."""

from collections.abc import Mapping

from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names

Shape = tuple[int, ...]


def weight_shapes(cfg: HookedConfig) -> dict[str, Shape]:
    """Every parameter of the network and its logical shape, in the order of the computation.

    A tied `unembed.W_U` is listed too; it is `embed.W_E` transposed.
    """
    return {name: weight.shape for name, weight in cfg.description.weights.items()}


def check_state(state: Mapping[str, Tensor], cfg: HookedConfig) -> None:
    """Refuse a state dict that does not hold the floating-point parameters its config promises.

    A tied `unembed.W_U` may be absent, and `pos_embed.W_pos` may have any number of rows.

    Raises:
        CheckpointError: lists all missing and unexpected names, wrong shapes and integer tensors.
    """
    shapes = weight_shapes(cfg)
    optional = {"unembed.W_U"} if cfg.tied_unembed else set()
    problems = []
    if missing := [name for name in shapes if name not in state and name not in optional]:
        problems.append(f"missing: {join_names(missing)}")
    if unexpected := [name for name in state if name not in shapes]:
        problems.append(f"unexpected: {join_names(unexpected)}")
    for name in (name for name in shapes if name in state):
        tensor = state[name]
        free = 1 if name == "pos_embed.W_pos" else 0
        if len(tensor.shape) != len(shapes[name]) or tuple(tensor.shape)[free:] != shapes[name][free:]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}; expected {shapes[name]}")
        if not tensor.is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}; expected floating point (dequantise it first)")
    if problems:
        raise CheckpointError("the state dict does not fit its config:\n- " + "\n- ".join(problems))
