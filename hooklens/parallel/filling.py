"""Weights for the parts of a network that a process has: read one after another, of each no more kept than that."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hooklens.config import DeclaredWeight
from hooklens.errors import CheckpointError, join_names
from hooklens.model.decoder import Decoder
from hooklens.parallel.tensor import TensorParallel
from hooklens.progress import progress_bar
from hooklens.weights.layout import to_stored


def fill_own_parts(
    decoder: Decoder,
    tensors: Iterable[tuple[str, Tensor]],
    heads: TensorParallel | None,
    *,
    layers: range,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a network that lies on the meta device the weights of its own layers and of what is outside of blocks.

    Args:
        decoder: the network; parameters that processes share are DTensors already.
        tensors: weights in their logical shapes, by the field's names; blocks are counted from the first own layer.
        heads: how heads and neurons are shared; None: they are not.
        layers: the layers that this process has.
        device: where weights go.
        dtype: of the weights.

    Raises:
        CheckpointError: a wrong shape, or a weight that is missing.
    """
    declared = decoder.cfg.description.weights
    wanted = {name for name in declared if _is_here(name, layers)}
    if decoder.cfg.tied_unembed:
        wanted.discard("unembed.W_U")
    missing = set(wanted)
    with progress_bar("loading weights", tensors, total=len(wanted), unit="tensor", progress=None) as bar:
        for given, tensor in bar:
            name = _renumber(given, layers.start)
            if name not in wanted:
                continue
            weight = declared[name]
            if tuple(tensor.shape) != weight.shape:
                raise CheckpointError(f"{name!r} has shape {list(tensor.shape)}; expected {list(weight.shape)}")
            missing.discard(name)
            _fill(decoder, weight, tensor, heads, device, dtype)
    if missing:
        raise CheckpointError(f"{len(missing)} parameters have no tensor: {join_names(sorted(missing))}")


def _fill(
    decoder: Decoder,
    weight: DeclaredWeight,
    tensor: Tensor,
    heads: TensorParallel | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    path, _, held_as = weight.parameter.rpartition(".")
    holder = decoder.get_submodule(path)
    blank: Any = holder._parameters[held_as]
    own = to_stored(tensor if heads is None else heads.own_part(weight, tensor), weight.stored, weight.axes)
    if isinstance(blank, DTensor):
        own = _own_rows(own, blank)
    # In a memory of its own: else the whole tensor, or the file that it is mapped from, would live on.
    kept: Any = own.detach().to(device=device, dtype=dtype, copy=True).contiguous()
    if isinstance(blank, DTensor):
        kept = DTensor(kept, blank._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    holder._parameters[held_as] = nn.Parameter(kept, requires_grad=kept.is_floating_point())


def _own_rows(own: Tensor, blank: DTensor) -> Tensor:
    """Of what a process computes with the share that it keeps between the times that a layer runs."""
    names = blank.device_mesh.mesh_dim_names or ()
    if "fully_sharded" not in names:
        return own
    mesh = blank.device_mesh["fully_sharded"]
    chunks = list(own.chunk(mesh.size()))
    chunks += [own[:0]] * (mesh.size() - len(chunks))
    return chunks[mesh.get_local_rank()]


def _is_here(name: str, layers: range) -> bool:
    return not name.startswith("blocks.") or int(name.split(".")[1]) in layers


def _renumber(name: str, first: int) -> str:
    if not name.startswith("blocks."):
        return name
    blocks, layer, rest = name.split(".", 2)
    return f"{blocks}.{int(layer) + first}.{rest}"
