"""The weights of all layers under the field's names, stacked on access."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.errors import ConfigError
from hooklens.model.decoder import Decoder
from hooklens.weights.composition import all_composition_scores
from hooklens.weights.factored import FactoredMatrix
from hooklens.weights.shapes import weight_shapes


class WeightViews(Decoder):
    """A network that is also read: every property below stacks the layers' weights along a first axis.

    Biases that the model does not have read as zeros. Nothing is kept: a change of the weights shows in the
    next reading.
    """

    def _stack(self, module: str, name: str) -> Tensor:
        weights = [getattr(block.get_submodule(module), name) for block in self.block_list()]
        if weights:
            return torch.stack(weights)
        shape = weight_shapes(self.cfg.replace(n_layers=1, windows=None))[f"blocks.0.{module}.{name}"]
        return torch.zeros((0, *shape), device=self.device, dtype=self.dtype)

    def _stack_biases(self, module: str, name: str, *shape: int) -> Tensor:
        biases = [getattr(block.get_submodule(module), name, None) for block in self.block_list()]
        zeros = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return torch.stack([zeros if bias is None else bias for bias in biases]) if biases else zeros[None][:0]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802
        """Token embedding."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:  # noqa: N802
        """Learned position embedding.

        Raises:
            ConfigError: the model has none.
        """
        if not hasattr(self, "pos_embed"):
            raise ConfigError(f"W_pos: positions are {self.cfg.positions!r}; only learned positions have a table")
        return self.pos_embed.W_pos[self.pos_embed.offset :]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # noqa: N802
        """Unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:  # noqa: N802
        """Unembedding bias."""
        bias = self.unembed.b_U
        return torch.zeros(self.cfg.d_vocab, device=self.device, dtype=self.dtype) if bias is None else bias

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:  # noqa: N802
        """Query weights."""
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:  # noqa: N802
        """Key weights."""
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:  # noqa: N802
        """Value weights."""
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:  # noqa: N802
        """Attention output weights."""
        return self._stack("attn", "W_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:  # noqa: N802
        """MLP input weights; the linear half of a gated MLP."""
        return self._stack("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:  # noqa: N802
        """Gate weights of a gated MLP.

        Raises:
            ConfigError: the MLP has no gate.
        """
        if not self.cfg.gated_mlp:
            raise ConfigError("W_gate: this model's MLPs have no gate (cfg.gated_mlp is False)")
        return self._stack("mlp", "W_gate")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:  # noqa: N802
        """MLP output weights."""
        return self._stack("mlp", "W_out")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:  # noqa: N802
        """Query biases."""
        return self._stack_biases("attn", "b_Q", self.cfg.n_heads, self.cfg.d_head)

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:  # noqa: N802
        """Key biases."""
        return self._stack_biases("attn", "b_K", self.cfg.n_kv_heads, self.cfg.d_head)

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:  # noqa: N802
        """Value biases."""
        return self._stack_biases("attn", "b_V", self.cfg.n_kv_heads, self.cfg.d_head)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:  # noqa: N802
        """Attention output biases."""
        return self._stack_biases("attn", "b_O", self.cfg.d_model)

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases."""
        return self._stack_biases("mlp", "b_in", self.cfg.d_mlp)

    @property
    def b_gate(self) -> Float[Tensor, "layer d_mlp"]:
        """Gate biases."""
        return self._stack_biases("mlp", "b_gate", self.cfg.d_mlp)

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases."""
        return self._stack_biases("mlp", "b_out", self.cfg.d_model)

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

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each head writes into what each later head reads (Elhage et al. 2021).

        Args:
            mode: `"Q"`, `"K"` or `"V"`: which input of the later head.

        Returns:
            Scores in [0, 1], 0 where the second head is not in a later layer.
        """
        return all_composition_scores(self.W_Q, self.W_K, self.W_V, self.W_O, mode)

    def all_head_labels(self) -> list[str]:
        """`["L0H0", "L0H1", ...]`."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def accumulated_bias(
        self, layer: int, *, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the biases written to the stream below a layer.

        Args:
            layer: blocks below it count; `n_layers` takes all.
            mlp_input: count this layer's attention bias, too; in a parallel block the MLP reads beside it.
            include_mlp_biases: count `b_out`, not only `b_O`.

        Raises:
            ConfigError: the layer is out of range, or norms stand between the biases and the stream.
        """
        if self.cfg.norm_after:
            raise ConfigError(
                "accumulated_bias: norms follow the branches (cfg.norm_after), so what a bias adds differs from "
                "position to position; the last component of cache.get_full_resid_decomposition() is that sum"
            )
        if not 0 <= layer <= self.cfg.n_layers - mlp_input:
            raise ConfigError(f"accumulated_bias: layer {layer} is out of range for {self.cfg.n_layers} layers")
        in_between = mlp_input and self.cfg.wiring == "sequential"
        total = self.b_O[: layer + in_between].sum(0)
        return total + self.b_out[:layer].sum(0) if include_mlp_biases else total

    @property
    def n_params_total(self) -> int:
        """Number of parameters, a tied unembedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
