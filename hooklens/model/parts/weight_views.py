"""The weights of all layers under the field's names, stacked on access."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.arguments import read_flag, read_int, read_one_of, reads
from hooklens.config import HookedConfig, LearnedPositions, MoEConfig, ShortformerPositions
from hooklens.errors import ConfigError
from hooklens.model.decoder import Decoder
from hooklens.model.parts.part import read_weight
from hooklens.model.parts.quantised import quantised_maps
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.weights.composition import all_composition_scores
from hooklens.weights.factored import FactoredMatrix


def _read(part: Any, name: str) -> Any:
    """A weight of a part; None where it has none, or no part stands there."""
    try:
        return read_weight(part, name)
    except AttributeError:
        return None


class _Stacked:
    """The weights of one name of all layers, along a first axis; biases that maps lack read as zeros.

    Args:
        module: where a layer has it.
        axes: of one layer's.
        other_axes: what these may be in place of that, where they are so in all layers.
    """

    def __init__(self, module: str, axes: str, other_axes: str | None = None) -> None:
        self._module, self._axes, self._other_axes = module, axes.split(), (other_axes or axes).split()

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, views: "WeightViews | None", owner: type) -> Any:
        if views is None:
            return self
        decoder, name = views.as_decoder(), self._name
        refuse_shared(decoder, name, ConfigError)
        parts = [getattr(block, self._module) for block in decoder.block_list()]
        found = [_read(part, name) for part in parts]
        declared = [decoder.cfg.description.weights.get(f"blocks.{i}.{self._module}.{name}") for i in range(len(parts))]
        axes = self._axes
        if declared and all(one is not None and list(one.axes) == self._other_axes for one in declared):
            axes = self._other_axes
        without = self._maps(parts) if name.startswith("b_") else found
        lacking = [
            layer
            for layer, (one, weight) in enumerate(zip(without, declared, strict=True))
            if one is None or (weight is not None and list(weight.axes) != axes)
        ]
        if lacking:
            first = declared[lacking[0]]
            reason = decoder.cfg.description.why_absent(f"blocks.{lacking[0]}.{self._module}.{name}")
            if first is not None:
                reason = f"it is {list(first.axes)} there, not {axes}"
            others = f". Other layers' are at model.blocks[i].{self._module}.{name}"
            raise ConfigError(
                f"{name}: layers {lacking} have none: {reason or 'another part stands there'}"
                f"{others if len(lacking) < len(parts) else ''}"
            )
        shape = [decoder.cfg.size(axis) for axis in self._axes]
        empty = torch.zeros(shape, device=decoder.device, dtype=decoder.dtype)
        # On several devices the layers come together where the embedding lies.
        gathered = [empty if weight is None else weight.to(decoder.device) for weight in found]
        return torch.stack(gathered) if found else empty[None][:0]

    def _maps(self, parts: list[Any]) -> list[Any]:
        """What has to be there for a bias that is not there to be 0: the part, of attention the map."""
        if self._module != "attn":
            return parts
        return [getattr(part, f"W{self._name.removeprefix('b')}", None) for part in parts]

    def __set__(self, views: "WeightViews", value: object) -> None:
        raise AttributeError(
            f"{self._name} is put together when it is read; assign model.blocks[i].{self._module}.{self._name}"
        )


def _stacked(module: str, axes: str, other_axes: str | None = None) -> Any:
    return _Stacked(module, axes, other_axes)


class WeightViews:
    """What reads a network's weights: every property below stacks the layers' along a first axis.

    Biases that the model's maps do not have read as zeros. On several devices what is stacked comes to `model.device`.
    Nothing is kept: a change of the weights shows in the
    next reading.

    Raises:
        ConfigError: on reading a weight that a layer does not have, or a bias of attention or an MLP that it does not
            have; all such layers are named.
    """

    cfg: HookedConfig
    W_Q: Float[Tensor, "layer head d_model d_head"] = _stacked("attn", "head d_model d_head")
    W_K: Float[Tensor, "layer kv_head d_model d_head"] = _stacked("attn", "kv_head d_model d_head")
    W_V: Float[Tensor, "layer kv_head d_model d_head"] = _stacked("attn", "kv_head d_model d_head")
    W_O: Float[Tensor, "layer head d_head d_model"] = _stacked("attn", "head d_head d_model", "head d_head_v d_model")
    b_Q: Float[Tensor, "layer head d_head"] = _stacked("attn", "head d_head")
    b_K: Float[Tensor, "layer kv_head d_head"] = _stacked("attn", "kv_head d_head")
    b_V: Float[Tensor, "layer kv_head d_head"] = _stacked("attn", "kv_head d_head")
    b_O: Float[Tensor, "layer d_model"] = _stacked("attn", "d_model")
    # Of a gated MLP `W_in` is the linear half.
    W_in: Float[Tensor, "layer d_model d_mlp"] = _stacked("mlp", "d_model d_mlp")
    W_gate: Float[Tensor, "layer d_model d_mlp"] = _stacked("mlp", "d_model d_mlp")
    W_out: Float[Tensor, "layer d_mlp d_model"] = _stacked("mlp", "d_mlp d_model")
    b_in: Float[Tensor, "layer d_mlp"] = _stacked("mlp", "d_mlp")
    b_gate: Float[Tensor, "layer d_mlp"] = _stacked("mlp", "d_mlp")
    b_out: Float[Tensor, "layer d_model"] = _stacked("mlp", "d_model")

    def as_decoder(self) -> Decoder:
        """The network that is read."""
        assert isinstance(self, Decoder)
        return self

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802
        """Token embedding; of one with a width of its own the product with its projection, `embed.W_E` is the table."""
        return self.as_decoder().embed.vectors()

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:  # noqa: N802
        """Learned position embedding.

        Raises:
            ConfigError: the model has none.
        """
        if not isinstance(self.cfg.positions, LearnedPositions | ShortformerPositions):
            raise ConfigError(f"W_pos: positions are {self.cfg.positions!r}; only learned positions have a table")
        table: Tensor = self.as_decoder().pos_embed.W_pos
        return table[self.cfg.positions.offset :]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab_out"]:  # noqa: N802
        """Unembedding; with a projection before it, the product of the two. A `logits_scale` is not part of it."""
        return self.as_decoder().unembed.directions()

    @property
    def b_U(self) -> Float[Tensor, " d_vocab_out"]:  # noqa: N802
        """Unembedding bias."""
        decoder = self.as_decoder()
        bias: Tensor | None = decoder.unembed.b_U
        return torch.zeros(self.cfg.d_vocab_out, device=decoder.device, dtype=decoder.dtype) if bias is None else bias

    @property
    def QK(self) -> FactoredMatrix:  # noqa: N802
        """`W_Q W_K^T` of every head, `[layer head d_model d_model]`, in factors.

        Keys of a group are shared by its query heads. Positions and query-key norms are not part of it.
        """
        return FactoredMatrix(self.W_Q, self._per_query_head(self.W_K).mT)

    @property
    def OV(self) -> FactoredMatrix:  # noqa: N802
        """`W_V W_O` of every head, `[layer head d_model d_model]`, in factors."""
        return FactoredMatrix(self._per_query_head(self.W_V), self.W_O)

    def _per_query_head(self, weight: Float[Tensor, "layer kv_head d_model d_head"]) -> Tensor:
        group = self.cfg.n_heads // self.cfg.n_kv_heads
        return weight if group == 1 else weight.repeat_interleave(group, dim=1)

    @reads(mode=partial(read_one_of, options=("Q", "K", "V")))
    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each head writes into what each later head reads (Elhage et al. 2021).

        Weights are read as they are: fold norms first (`process_weights(fold_ln=True)`). With rotary positions the
        scores for `"Q"` and `"K"` hold at distance 0.

        Args:
            mode: `"Q"`, `"K"` or `"V"`: which input of the later head.

        Returns:
            Scores in [0, 1], 0 where the second head is not in a later layer.
        """
        return all_composition_scores(self.W_Q, self.W_K, self.W_V, self.W_O, mode)

    def all_head_labels(self) -> list[str]:
        """`["L0H0", "L0H1", ...]`, of the layers that have attention."""
        attending = [block.layer for block in self.cfg.blocks if block.attn is not None]
        return [f"L{layer}H{head}" for layer in attending for head in range(self.cfg.n_heads)]

    @reads(layer=read_int, mlp_input=read_flag, include_mlp_biases=read_flag)
    def accumulated_bias(
        self, layer: int, *, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the biases written to the stream below a layer, times `residual_scale` where the model has one.

        Args:
            layer: blocks below it count; `n_layers` takes all.
            mlp_input: count this layer's attention bias, too; in a parallel block the MLP reads beside it.
            include_mlp_biases: count `b_out`, not only `b_O`.

        Raises:
            ConfigError: the layer is out of range, or norms or the gates of experts stand between the biases and the
                stream.
        """
        if any(block.norm_after for block in self.cfg.blocks):
            raise ConfigError(
                "accumulated_bias: norms follow the branches (cfg.norm_after), so what a bias adds differs from "
                "position to position; the last component of cache.get_full_resid_decomposition() is that sum"
            )
        if self.cfg.norm_stream:
            raise ConfigError(
                "accumulated_bias: the stream goes through norms (cfg.norm_stream), so no bias stays in it as it is"
            )
        if not 0 <= layer <= self.cfg.n_layers - mlp_input:
            raise ConfigError(f"accumulated_bias: layer {layer!r} is out of range for {self.cfg.n_layers} layers")
        mixtures = [block.layer for block in self.cfg.blocks[:layer] if isinstance(block.mlp, MoEConfig)]
        written = [one for one in mixtures if f"blocks.{one}.mlp.b_out" in self.cfg.description.weights]
        if include_mlp_biases and written:
            raise ConfigError(
                f"accumulated_bias: layers {written} are mixtures of experts with biases, and what a bias adds depends "
                "on the experts of each token; leave them out with include_mlp_biases=False"
            )
        in_between = mlp_input and self.cfg.wiring == "sequential"
        decoder = self.as_decoder()
        names = [f"blocks.{below}.attn.b_O" for below in range(layer + in_between)]
        names += [f"blocks.{below}.mlp.b_out" for below in range(layer if include_mlp_biases else 0)]
        total = torch.zeros(self.cfg.d_model, device=decoder.device, dtype=decoder.dtype)
        for name in names:
            if name in self.cfg.description.weights:
                path, _, bias = name.rpartition(".")
                total = total + getattr(decoder.get_submodule(path), bias).to(total.device)
        return total if self.cfg.residual_scale == 1 else total * self.cfg.residual_scale

    @property
    def n_params_total(self) -> int:
        """Number of parameters, a tied unembedding counted once, and quantised ones as many as they stand for."""
        decoder = self.as_decoder()
        counts = {id(parameter): parameter.numel() for parameter in decoder.parameters()}
        for linear in quantised_maps(decoder).values():
            # Several numbers may lie in one byte.
            assert isinstance(linear, nn.Linear)
            counts[id(linear.weight)] = linear.in_features * linear.out_features
        return sum(counts.values())
