"""Places on the residual stream, and what a decomposition there needs of a cache.

The stream that enters attention or MLP of block `layer` is the sum of all that was written below:

    stream(layer) = embed + pos_embed + sum over l < layer of (attn_out[l] + mlp_out[l])

(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). `layer = n_layers` is the stream
that the final norm and the unembedding read.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.memory import take
from hooklens.activation_cache.missing import MissingActivationError, explain_missing, why_absent
from hooklens.config import HookedConfig
from hooklens.errors import CacheError, join_names
from hooklens.hooks.choice import Choice, read_choice, resolve_choice


@dataclass(frozen=True, kw_only=True)
class StreamPoint:
    """A place on the residual stream of a model; `locate` checks one.

    Attributes:
        cfg: the model's configuration.
        layer: the block that reads the stream there; `n_layers` is the unembedding.
        mlp_input: the block's MLP reads it, not its attention.
    """

    cfg: HookedConfig
    layer: int
    mlp_input: bool

    @property
    def label(self) -> str:
        """`"3_pre"`, `"3_mid"` between attention and MLP, `"final_post"` at the end."""
        if self.layer == self.cfg.n_layers:
            return "final_post"
        return f"{self.layer}_{'mid' if self.has_mid else 'pre'}"

    @property
    def has_mid(self) -> bool:
        """Whether this is the place between attention and MLP of a sequential block."""
        return self.mlp_input and self.cfg.block(self.layer).has_mid

    @property
    def attention_layers(self) -> list[int]:
        """Layers whose attention has written to the stream here; the MLP of a parallel block reads beside it.

        Raises:
            CacheError: what is written does not stay in the stream as it is.
        """
        self._require_sum()
        return [block.layer for block in self.cfg.blocks[: self.layer + self.has_mid] if block.attn is not None]

    @property
    def mlp_layers(self) -> list[int]:
        """Layers whose MLP has written to the stream here.

        Raises:
            CacheError: as for attention.
        """
        self._require_sum()
        return [block.layer for block in self.cfg.blocks[: self.layer] if block.mlp is not None]

    def _require_sum(self) -> None:
        if self.cfg.norm_stream:
            raise CacheError(
                "in this network the stream goes through norms (cfg.norm_stream), so it is no sum of what was written "
                "to it; read the streams themselves (accumulated_resid, resid_pre, resid_mid, resid_post)"
            )

    @property
    def norm(self) -> str | None:
        """The norm through which the stream is read here; None where it is read as it is.

        In a layer without attention the MLP is the first to read it.

        Raises:
            CacheError: the layer has neither.
        """
        if self.layer == self.cfg.n_layers:
            return None if self.cfg.final_norm is None else "ln_final"
        block = self.cfg.block(self.layer)
        if block.attn is None and block.mlp is None:
            raise CacheError(
                f"layer {self.layer} has neither attention nor an MLP, so nothing reads the stream there through a "
                "norm; give the layer that reads it next"
            )
        norm = block.mlp_norm if self.mlp_input or block.attn is None else block.attn_norm
        return None if norm is None else f"blocks.{self.layer}.{norm}"

    @property
    def names(self) -> list[str]:
        """Hook points that carry the stream here, the one to prefer first."""
        if self.layer == self.cfg.n_layers:
            return [f"blocks.{self.layer - 1}.hook_resid_post"] if self.layer else ["hook_embed"]
        block = f"blocks.{self.layer}"
        if self.has_mid:
            return [f"{block}.hook_resid_mid", f"{block}.hook_mlp_in"]
        below = [f"blocks.{self.layer - 1}.hook_resid_post"] if self.layer else []
        return [f"{block}.hook_resid_pre", *below]

    def name_in(self, cache: CapturedActivations) -> str:
        """The first of `names` that was captured; where none was, the first of all."""
        return next((name for name in self.names if name in cache), self.names[0])

    def read(self, cache: CapturedActivations) -> Float[Tensor, "*batch pos d_model"]:
        """The stream here.

        Raises:
            MissingActivationError: it was not captured.
        """
        return cache[self.name_in(cache)]


def locate(cfg: HookedConfig, layer: SupportsIndex | None, *, mlp_input: bool = False) -> StreamPoint:
    """The place that `layer` names: 0 to `n_layers`; None and -1 are the end of the stream.

    Raises:
        CacheError: the layer is out of range, or there is no MLP.
    """
    number = -1 if layer is None else operator.index(layer)
    resolved = cfg.n_layers if number == -1 else number
    if not 0 <= resolved <= cfg.n_layers:
        raise CacheError(
            f"layer {layer} is out of range: the stream enters layers 0 to {cfg.n_layers - 1}, and {cfg.n_layers} "
            "(or None, or -1) is its end, which the unembedding reads"
        )
    if mlp_input and resolved == cfg.n_layers:
        raise CacheError(
            f"mlp_input: layer {layer} is the end of the stream, which the unembedding reads, not an MLP; "
            f"give a layer from 0 to {cfg.n_layers - 1}"
        )
    if mlp_input and cfg.block(resolved).mlp is None:
        raise CacheError(f"mlp_input: layer {resolved} has no MLP; leave mlp_input out")
    return StreamPoint(cfg=cfg, layer=resolved, mlp_input=mlp_input)


def places_up_to(point: StreamPoint, *, incl_mid: bool) -> list[StreamPoint]:
    """Every layer's entrance up to a place; `incl_mid`: the places between attention and MLP, too.

    Raises:
        CacheError: `incl_mid` where no block has such a place.
    """
    if incl_mid and not any(block.has_mid for block in point.cfg.blocks):
        why = "the blocks are parallel" if point.cfg.wiring == "parallel" else "no block has attention and an MLP"
        raise CacheError(f"accumulated_resid: incl_mid: {why}, so the stream has no such places")
    places = []
    for layer in range(point.layer + 1):
        places.append(locate(point.cfg, layer))
        if incl_mid and layer < point.layer and point.cfg.block(layer).has_mid:
            places.append(locate(point.cfg, layer, mlp_input=True))
    return [*places, point] if point.has_mid else places


def require(cache: CapturedActivations, names: Iterable[str], *, purpose: str) -> None:
    """Refuse a cache that lacks activations; all that are missing are told at once.

    Raises:
        MissingActivationError: names what to capture.
    """
    missing = [name for name in names if name not in cache]
    if not missing:
        return
    absent = next((name for name in missing if why_absent(name, cache.cfg) is not None), None)
    if absent is not None:
        raise MissingActivationError(f"{purpose}: {explain_missing(absent, cache, cache.cfg)}")
    raise MissingActivationError(
        f"{purpose} needs activations that this cache does not hold: {join_names(missing)}; "
        "add them to names_filter (None captures all but the on-request ones)"
    )


def require_weight(cache: CapturedActivations, name: str) -> Tensor:
    """A weight of the model of the run.

    Raises:
        CacheError: the cache has no weights, or not this one.
    """
    if cache.weights is None:
        raise CacheError(
            f"the cache holds no weights, and {name!r} is needed; a cache read from a file has none. Give it its "
            "model's: cache = hooklens.analysis.connect_cache(cache, model)"
        )
    if name not in cache.weights:
        raise CacheError(f"the weights that the cache was given lack {name!r}; expected those of the model of the run")
    return cache.weights[name]


def take_positions(tensor: Tensor, axis: int, pos_slice: Choice) -> Tensor:
    """Some of the captured positions of an activation; an int drops the axis.

    Args:
        tensor: the activation.
        axis: its position axis, counted from the end (`-2` in the stream).
        pos_slice: which; None: all.

    Raises:
        InputError: a position is out of range or named twice, or `pos_slice` is of another kind.
    """
    index = read_choice(pos_slice, what="pos_slice", refuse_tuple=True)
    chosen = resolve_choice(index, tensor.shape[axis], what="pos_slice", noun="captured positions")
    return tensor.select(axis, chosen[0]) if isinstance(index, int) else take(tensor, axis, chosen)
