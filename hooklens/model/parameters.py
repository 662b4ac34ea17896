"""Giving a network its weights, and reading them by name."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hooklens.errors import CheckpointError, join_names, suggest_names
from hooklens.model.decoder import Decoder
from hooklens.weights.layout import to_stored_layout


class ModelWeights(Mapping[str, Tensor]):
    """A network's weights by name, read when asked for and shared, not copied.

    A tied `unembed.W_U` is among them, though it is no parameter of its own.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __getitem__(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        try:
            found = getattr(self._decoder.get_submodule(path), part)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(found, Tensor):
            raise KeyError(name)
        return found.detach()

    def __iter__(self) -> Iterator[str]:
        for name, _ in self._decoder.named_parameters():
            yield name
        if self._decoder.cfg.tied_unembed:
            yield "unembed.W_U"

    def __len__(self) -> int:
        return sum(1 for _ in self)


def fill_parameters(
    decoder: Decoder,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Put tensors in the place of a network's parameters, one after another.

    The network may lie on the `meta` device, so that at no time more than one copy of it exists. A tensor
    that already has the dtype, device and layout is used as it is.

    Raises:
        CheckpointError: a name the network does not have, a wrong shape, or a parameter left without tensor.
    """
    missing = {name for name, _ in decoder.named_parameters()}
    known = set(missing)
    for name, tensor in tensors:
        if name == "unembed.W_U" and decoder.cfg.tied_unembed:
            continue
        if name not in known:
            raise CheckpointError(f"the network has no parameter {name!r}.{suggest_names(name, known)}")
        path, _, part = name.rpartition(".")
        module = decoder.get_submodule(path)
        wanted = module.get_parameter(part)
        if tensor.shape != wanted.shape:
            raise CheckpointError(f"{name!r} has shape {list(tensor.shape)}; expected {list(wanted.shape)}")
        placed = to_stored_layout(name, tensor.detach().to(device=device, dtype=dtype))
        setattr(module, part, nn.Parameter(placed, requires_grad=placed.is_floating_point()))
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{len(missing)} parameters have no tensor: {join_names(sorted(missing))}")


def check_tied(state: Mapping[str, Tensor], *, tied_unembed: bool) -> None:
    """Refuse a state dict whose `W_U` is not the `W_E` it is said to be tied to.

    Raises:
        CheckpointError: the two differ.
    """
    if tied_unembed and "unembed.W_U" in state and not torch.equal(state["unembed.W_U"], state["embed.W_E"].T):
        raise CheckpointError(
            "cfg.tied_unembed is True, but unembed.W_U is not the transpose of embed.W_E; "
            "set tied_unembed=False to keep both"
        )
