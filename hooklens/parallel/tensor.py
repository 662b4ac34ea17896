"""Heads and neurons shared by several processes: tensor parallelism, on `torch.distributed.tensor.parallel`.

Each process computes some heads of every layer and some neurons of every MLP, as Megatron-LM does (Shoeybi et al. 2019,
arXiv:1909.08053): maps into heads and neurons have their rows taken apart, maps back their columns, and what these
write is summed over the processes. Where there are fewer key-value heads than processes, each computes all of these.
The residual stream, embeddings and norms are the same everywhere. Mixtures of experts, latent attention and MLPs with
a norm of the neurons stay whole in each process.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hooklens.axes import HookSite
from hooklens.config import DeclaredWeight
from hooklens.errors import ConfigError
from hooklens.hooks import HookPoint
from hooklens.hooks.spread import SpreadPoint
from hooklens.model.attention.attention import Attention
from hooklens.model.attention.head_norm import HeadNorm
from hooklens.model.decoder import Decoder
from hooklens.model.mlp import MLP
from hooklens.parallel.spread import GradientSums, MeshSpread

_OF_HEADS = ("head", "kv_head")
_OF_NEURONS = ("d_mlp",)


class _Written(RowwiseParallel):
    """A map back to the stream, which waits for the sum: a hook is shown a tensor and no promise of one."""

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: Any, mod: Any, outputs: Any, device_mesh: Any) -> Any:
        summed = outputs.redistribute(placements=output_layouts, async_op=False)
        return summed.to_local()


class TensorParallel:
    """Which weights of a network the processes share along their heads and neurons.

    Args:
        decoder: the network; it may lie on the meta device.
        mesh: the processes.

    Raises:
        ConfigError: heads, key-value heads or neurons that cannot be shared equally; all such layers are named.
    """

    def __init__(self, decoder: Decoder, mesh: DeviceMesh) -> None:
        self.mesh, self.spread = mesh, MeshSpread(mesh)
        self.attentions = {f"blocks.{i}.attn": b.attn for i, b in enumerate(decoder.block_list()) if is_split(b.attn)}
        self.mlps = {f"blocks.{i}.mlp": b.mlp for i, b in enumerate(decoder.block_list()) if is_split(b.mlp)}
        # Parameters that all processes have, and act on each one's own heads or neurons.
        self._replicated: list[tuple[nn.Module, str]] = []
        _check_sizes(decoder, {**self.attentions, **self.mlps}, mesh.size())

    def own_part(self, weight: DeclaredWeight, tensor: Tensor) -> Tensor:
        """What this process holds of a weight in its logical shape."""
        axis = self._shared_axis(weight)
        return tensor if axis is None else tensor.chunk(self.spread.n_parts, axis)[self.spread.part]

    def _shared_axis(self, weight: DeclaredWeight) -> int | None:
        """The axis along which processes share a weight; None: each has all of it."""
        part = ".".join(weight.name.split(".")[:3])
        if part in self.attentions:
            inside_norm = len(weight.name.split(".")) > 4
            whole_keys = _has_whole_keys(self.attentions[part], self.spread.n_parts)
            shared = () if inside_norm else _OF_HEADS[:1] if whole_keys else _OF_HEADS
        else:
            shared = _OF_NEURONS if part in self.mlps else ()
        return next((place for place, axis in enumerate(weight.axes) if axis in shared), None)

    def install(self, decoder: Decoder) -> None:
        """Have a network that lies on the meta device compute its part; its shared parameters become DTensors."""
        for attn in self.attentions.values():
            self._install_attention(attn)
        for mlp in self.mlps.values():
            maps = ("in_proj", "gate_proj") if mlp.gated else ("in_proj",)
            self._install_maps(mlp, maps, "out_proj")
            self._install_points(mlp, _OF_NEURONS)
            for name in ("alpha_p", "alpha_n"):
                if name in mlp._parameters:
                    self._replicated.append((mlp, name))

    @property
    def has_replicated(self) -> bool:
        """Whether weights that all processes have act on each one's own heads or neurons."""
        return bool(self._replicated)

    def sum_gradients(self, sums: GradientSums) -> None:
        """Have the gradients of weights that act on each process's own heads or neurons summed over the processes."""
        for module, name in self._replicated:
            sums.add(module._parameters[name], self.mesh)

    def _install_attention(self, attn: Attention) -> None:
        attn.keys_are_whole = _has_whole_keys(attn, self.spread.n_parts)
        into = ("q_proj",) if attn.keys_are_whole else ("q_proj", "k_proj", "v_proj")
        self._install_maps(attn, into, "o_proj")
        attn.spread = self.spread
        sinks = attn._parameters["sinks"]
        if sinks is not None:
            attn._parameters["sinks"] = nn.Parameter(distribute_tensor(sinks.detach(), self.mesh, [Shard(0)]))
        if attn.alibi is not None:
            attn.alibi.part = (self.spread.part, self.spread.n_parts)
        self._install_points(attn, _OF_HEADS)
        if attn.keys_are_whole:
            for point in _key_points(attn):
                point.spread = None
        # What heads write is whole before it is shown, see `Attention`.
        attn.hook_result.spread = None
        for norm in (attn.q_norm, attn.k_norm):
            if isinstance(norm, HeadNorm) and not (norm is attn.k_norm and attn.keys_are_whole):
                norm.spread = SpreadPoint(self.spread, -2)
                for point in (norm.hook_scale, norm.hook_normalized):
                    point.spread = None
            elif norm is not None and not (norm is attn.k_norm and attn.keys_are_whole):
                self._replicated += [(norm, name) for name, one in norm._parameters.items() if one is not None]

    def _install_maps(self, part: nn.Module, into: tuple[str, ...], back: str) -> None:
        for name in into:
            parallelize_module(part.get_submodule(name), self.mesh, ColwiseParallel())
        parallelize_module(part.get_submodule(back), self.mesh, _Written())

    def _install_points(self, part: nn.Module, shared: tuple[str, ...]) -> None:
        for point in part.modules():
            if isinstance(point, HookPoint) and (dim := _find_axis(point.site, shared)) is not None:
                point.spread = SpreadPoint(self.spread, dim)


def is_split(part: nn.Module | None) -> Any:
    """Whether processes share a part; others are whole in each of them."""
    return type(part) is Attention or (type(part) is MLP and part.ln is None)


def _has_whole_keys(attn: Attention, n_parts: int) -> bool:
    """Whether there are fewer key-value heads than processes, each of whose query heads read one of them."""
    n_kv_heads: int = attn.shapes["W_K"][0]
    return n_kv_heads < n_parts and n_parts % n_kv_heads == 0


def _key_points(attn: Attention) -> Iterator[HookPoint]:
    """The hook points of keys and values."""
    for name, point in attn.named_modules():
        of_keys = name.startswith(("hook_k", "hook_v", "hook_rot_k", "k_norm"))
        if isinstance(point, HookPoint) and of_keys:
            yield point


def _find_axis(site: HookSite | None, shared: tuple[str, ...]) -> int | None:
    axes = () if site is None else site.axes
    return next((place for place, axis in enumerate(axes) if axis in shared), None)


def _check_sizes(decoder: Decoder, parts: dict[str, Any], n_parts: int) -> None:
    problems: dict[str, list[int]] = {}
    for name, size, layer in _shared_sizes(parts, n_parts):
        if size % n_parts:
            problems.setdefault(f"{size} {name}", []).append(layer)
    if problems:
        told = "; ".join(f"{what} (layers {layers})" for what, layers in problems.items())
        raise ConfigError(
            f"tensor={n_parts}: {told} cannot be shared equally by {n_parts} processes; choose a number that divides "
            "them, or share layers (pipeline=) or weights (fully_sharded=)"
        )


def _shared_sizes(parts: dict[str, Any], n_parts: int) -> Iterator[tuple[str, int, int]]:
    for name, part in parts.items():
        layer = int(name.split(".")[1])
        if isinstance(part, Attention):
            yield "heads", part.shapes["W_Q"][0], layer
            if not _has_whole_keys(part, n_parts):
                yield "key-value heads", part.shapes["W_K"][0], layer
        else:
            yield "neurons", part.shapes["W_in"][1], layer
