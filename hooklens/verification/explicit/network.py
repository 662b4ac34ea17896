"""What each hook point has to show, given what the points before it show."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import (
    LearnedPositions,
    NormConfig,
    RotaryPositions,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.model.attention.attention import Attention
from hooklens.model.mlp import MLP
from hooklens.model.moe import MoE
from hooklens.verification.explicit.activations import (
    centre,
    denominator,
)
from hooklens.verification.explicit.batch import Batch
from hooklens.verification.explicit.block import BlockFormulas, Read, Unknown
from hooklens.verification.explicit.positions import (
    rotary_table,
    rotate,
    sinusoidal_table,
)
from hooklens.verification.explicit.weights import ExplicitWeights, why_unknown

LOGITS = "logits"
"""Stands for what a call gives back, where hook points stand by their names."""

_LAYER = re.compile(r"^blocks\.\d+\.")


class ExplicitNetwork:
    """The definitions of a network's activations on one batch.

    `compute(name, read)` makes the tensor at a hook point from those that `read` gives: what a run has shown, or what
    was computed before. All are float64 `[batch pos ...]` over whole sequences.

    Args:
        model: the network. Its parameters are read, none of its code runs.
        batch: the sequences.
        table_dtype: in which rotary angles are made.
    """

    def __init__(self, model: HookedCausalLM, batch: Batch, *, table_dtype: torch.dtype = torch.float32) -> None:
        self.cfg, self.dtype, self.batch = model.cfg, model.dtype, batch
        self.names = set(model.hook_points())
        self._weights = ExplicitWeights(model)
        self._table_dtype = table_dtype
        self._tables: dict[RotaryPositions, tuple[Tensor, Tensor]] = {}
        self._unknown: dict[str, str] = {}
        for layer, block in enumerate(model.block_list()):
            for own, kinds in (("attn", (Attention,)), ("mlp", (MLP, MoE))):
                part = block._modules.get(own)
                if part is not None and (reason := why_unknown(part, kinds)) is not None:
                    self._unknown[f"blocks.{layer}.{own}"] = reason

    def why_unknown(self) -> dict[str, str]:
        """The parts that have no definition here, and why."""
        return dict(self._unknown)

    def compute(self, name: str, read: Read) -> Tensor:
        """The tensor at a hook point, or the logits.

        Raises:
            Unknown: it has no definition here.
        """
        layer = layer_of(name)
        if layer is None:
            return self._compute_outside(name, read)
        block = BlockFormulas(self, self.cfg.block(layer), read)
        own = _LAYER.sub("", name)
        if own.startswith("attn."):
            self.require(f"blocks.{layer}.attn")
        if own.startswith("mlp."):
            self.require(f"blocks.{layer}.mlp")
        return block.compute(own)

    def require(self, part: str) -> None:
        """Refuse to go on where a part has no definition here."""
        if part in self._unknown:
            raise Unknown(f"{part}: {self._unknown[part]}")

    def _compute_outside(self, name: str, read: Read) -> Tensor:
        formulas: dict[str, Callable[[], Tensor]] = {
            "hook_embed": lambda: self.normed("embed.ln", self._embed(), read),
            "embed.ln.hook_scale": lambda: self.norm_part("embed.ln", "hook_scale", self._embed(), read),
            "embed.ln.hook_normalized": lambda: self.norm_part("embed.ln", "hook_normalized", self._embed(), read),
            "hook_pos_embed": self._embed_positions,
            "ln_final.hook_scale": lambda: self.norm_part("ln_final", "hook_scale", self._last_stream(read), read),
            "ln_final.hook_normalized": lambda: self.norm_part(
                "ln_final", "hook_normalized", self._last_stream(read), read
            ),
            "unembed.hook_in": lambda: self.normed("ln_final", self._last_stream(read), read),
            "unembed.hook_out": lambda: self._unembed(read("unembed.hook_in")),
            LOGITS: lambda: self._cap(read("unembed.hook_out")),
        }
        if name not in formulas:
            raise Unknown(f"{name}: the point belongs to a part of one's own")
        return formulas[name]()

    def _embed(self) -> Tensor:
        scale = 1.0 if self.cfg.embed_scale is None else self.cfg.embed_scale
        if self.cfg.embed_scale_rounded:
            scale = float(torch.tensor(scale, dtype=self.dtype))
        embedded = self._weights["embed.table.weight"][self.batch.tokens] * scale
        return embedded if self.cfg.d_embed is None else self._weights.apply("embed.proj_in", embedded)

    def _embed_positions(self) -> Tensor:
        positions = self.cfg.positions
        if isinstance(positions, SinusoidalPositions):
            table = sinusoidal_table(positions, self.batch, self.cfg.d_model, self._table_dtype)
            return table.to(self.dtype).double()
        assert isinstance(positions, LearnedPositions | ShortformerPositions)
        return self._weights["pos_embed.table.weight"][self.batch.positions() + positions.offset]

    def _unembed(self, x: Tensor) -> Tensor:
        if self.cfg.d_embed is not None:
            x = self._weights.apply("unembed.proj_out", x)
        if self.cfg.tied_unembed:
            made, bias = x @ self._weights["embed.table.weight"].T, self._weights.find("unembed.b_U")
            return (made if bias is None else made + bias) * self.cfg.logits_scale
        return self._weights.apply("unembed.proj", x) * self.cfg.logits_scale

    def _cap(self, logits: Tensor) -> Tensor:
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _last_stream(self, read: Read) -> Tensor:
        n_layers = self.cfg.n_layers
        return read(f"blocks.{n_layers - 1}.hook_resid_post") if n_layers else self.entrance(read)

    def entrance(self, read: Read) -> Tensor:
        """The stream entering the first block."""
        embedded = read("hook_embed")
        in_stream = isinstance(self.cfg.positions, LearnedPositions | SinusoidalPositions)
        return embedded + read("hook_pos_embed") if in_stream else embedded

    def norm_part(self, place: str, own: str, x: Tensor, read: Read) -> Tensor:
        """What a norm's own hook points show."""
        norm, axes = self._norm_at(place), self._normed_axes(place)
        if own == "hook_scale":
            return denominator(x, norm, axes)
        return centre(x, norm, axes) / read(f"{place}.hook_scale")

    def normed(self, place: str, x: Tensor, read: Read) -> Tensor:
        """The output of a norm; what enters, where the network has no such norm."""
        if f"{place}.hook_normalized" not in self.names:
            return x
        return self._scaled(place, read(f"{place}.hook_normalized"))

    def norm_of(self, place: str, x: Tensor) -> Tensor:
        """What a norm makes of another tensor than the one it shows."""
        if f"{place}.hook_normalized" not in self.names:
            return x
        norm, axes = self._norm_at(place), self._normed_axes(place)
        return self._scaled(place, centre(x, norm, axes) / denominator(x, norm, axes))

    def _norm_at(self, place: str) -> NormConfig:
        """The kind of norm at a place that has one."""
        return self.cfg.description.norms[place]

    def _normed_axes(self, place: str) -> tuple[int, ...]:
        """What a norm goes over: the last axis, or with it the heads'."""
        return (-2, -1) if ".attn." in place and self.cfg.qk_norm_over == "all_heads" else (-1,)

    def _scaled(self, place: str, normalized: Tensor) -> Tensor:
        gain, bias = (self._weight_of_norm(f"{place}.{word}", normalized.shape[-2]) for word in "wb")
        scaled = normalized
        if gain is not None:
            scaled = normalized * (1 + gain if self._norm_at(place).unit_offset else gain)
        return scaled if bias is None else scaled + bias

    def _weight_of_norm(self, name: str, n_heads: int) -> Tensor | None:
        """A norm's weight or bias; where each head has its own, those of as many heads as there are."""
        weight = self._weights.find(name)
        if weight is None or weight.ndim == 1:
            return weight
        return torch.stack([weight[head * len(weight) // n_heads] for head in range(n_heads)])

    def rotate(self, heads: Tensor, positions: RotaryPositions) -> Tensor:
        """Heads turned by the angles of their positions."""
        if positions not in self._tables:
            self._tables[positions] = rotary_table(positions, self.batch, self.dtype, self._table_dtype)
        return rotate(heads, positions, self._tables[positions])

    @property
    def weights(self) -> ExplicitWeights:
        """The parameters."""
        return self._weights
