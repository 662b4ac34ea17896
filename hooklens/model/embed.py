"""Embedding, positions that are vectors, unembedding."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.config import HookedConfig, LearnedPositions, ShortformerPositions, SinusoidalPositions
from hooklens.errors import InputError
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.hooks.foreign import Placed
from hooklens.model.norm import STREAM, Norm, norm
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.declared import Weight, When, point, weight
from hooklens.model.parts.part import Part, apply_linear

_NORMED = When(lambda cfg: cfg.embed_norm is not None, "its embedding has no norm")


def watch_tokens(
    point: HookPoint | Placed, tokens: Int[Tensor, "batch pos"], call: Call, d_vocab: int
) -> Int[Tensor, "batch pos"]:
    """The ids as listeners leave them.

    Raises:
        InputError: some are no tokens.
    """
    watched, changed = point.watch(tokens, call)
    if changed and not torch.compiler.is_compiling():
        outside = sorted(set(watched[(watched < 0) | (watched >= d_vocab)].tolist()))
        if outside:
            raise InputError(
                f"hook_tokens: a hook or edit put in the ids {outside[:10]}; this model has d_vocab={d_vocab}, "
                f"ids 0 to {d_vocab - 1}"
            )
    return watched


class _Table(Part):
    """A part that looks rows up in a table, an `nn.Embedding`."""

    can_be_replaced = False

    table: nn.Embedding

    def _make_weights(self, spec: HookedConfig, present: list[Weight]) -> None:
        for one in present:
            if one.module == "table":
                sizes = self.shapes[one.name]
                self.table = nn.Embedding(sizes[0], sizes[1], _weight=torch.empty(sizes))
        super()._make_weights(spec, [one for one in present if one.module != "table"])

    def _look_up(self, rows: Int[Tensor, "rows pos"], call: Call | None = None) -> Float[Tensor, "rows pos width"]:
        table: nn.Module = self.table
        found: Tensor = table(rows, call) if isinstance(table, Adapted) else table(rows)
        return found


def scale_in(factor: float, cfg: HookedConfig, dtype: torch.dtype) -> float | Float[Tensor, ""]:
    """The factor `embed_scale` as embeddings of a dtype are multiplied by it."""
    # A number is multiplied in the precision of the product, and the product is rounded once.
    return torch.tensor(factor, dtype=dtype) if cfg.embed_scale_rounded else factor


class Embed(_Table, place="embed"):
    """Token embedding `W_E [d_vocab, d_model]`, times `embed_scale` and through a norm where the model has these."""

    W_E: Float[Tensor, "d_vocab d_model"] = weight("d_vocab d_model", module="table", writes=True)
    ln: Norm | None = norm("norm of the embedding", kind=lambda cfg: cfg.embed_norm, when=_NORMED)

    def forward(self, tokens: Int[Tensor, "batch pos"], call: Call | None = None) -> Float[Tensor, "batch pos d_model"]:
        """What each token brings to the stream."""
        embedded = self._look_up(tokens, call)
        if self.cfg.embed_scale is not None:
            embedded = embedded * scale_in(self.cfg.embed_scale, self.cfg, embedded.dtype)
        embedded = self._widen(embedded, call)
        return embedded if self.ln is None else self.ln(embedded, call)

    def _widen(self, embedded: Tensor, call: Call | None = None) -> Tensor:
        """The embedding in the width of the stream."""
        return embedded

    def vectors(self) -> Float[Tensor, "d_vocab d_model"]:
        """The vector of each token in the width of the stream, without a scale or norm; `W_E` itself where it is so."""
        return self.W_E


class ProjectedEmbed(Embed):
    """Token embedding of a width of its own, `W_E [d_vocab, d_embed]`, projected to the stream's by `W_proj_in`."""

    proj_in: nn.Linear
    W_E: Float[Tensor, "d_vocab d_embed"] = weight("d_vocab d_embed", module="table")
    W_proj_in: Float[Tensor, "d_embed d_model"] = weight(
        "d_embed d_model", "d_model d_embed", module="proj_in", writes=True
    )

    def _widen(self, embedded: Tensor, call: Call | None = None) -> Tensor:
        return apply_linear(self._modules["proj_in"], embedded, call)

    def vectors(self) -> Float[Tensor, "d_vocab d_model"]:
        """`W_E W_proj_in`, computed."""
        return self._widen(self.W_E)


class PosEmbed(_Table, place="pos_embed"):
    """Learned positions `W_pos`, one row per position after `offset` rows."""

    W_pos: Float[Tensor, "position d_model"] = weight("position d_model", module="table", writes=True)

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.positions, LearnedPositions | ShortformerPositions)
        self.offset = cfg.positions.offset

    def forward(self, *, positions: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The row of `W_pos` of each position."""
        return self._look_up(positions + self.offset if self.offset else positions)


class HeadPosEmbed(PosEmbed):
    """The same for positions that are added to what queries and keys read, not to the stream."""

    W_pos: Float[Tensor, "position d_model"] = weight("position d_model", module="table")


class SinusoidalPosEmbed(Part, place="pos_embed"):
    """Sines and cosines of positions; see `SinusoidalPositions`. Made in float32, as models are trained with."""

    can_be_replaced = False

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.positions, SinusoidalPositions)
        self.positions = cfg.positions

    def forward(self, *, positions: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The vector of each position, in float32."""
        kind, n_pairs = self.positions, self.cfg.d_model // 2
        step = math.log(kind.base) / (n_pairs - 1 if kind.includes_base else n_pairs)
        frequencies = torch.exp(torch.arange(n_pairs, device=positions.device).float() * -step)
        angles = (positions + kind.offset).float()[..., None] * frequencies
        if kind.layout == "half":
            return torch.cat([angles.sin(), angles.cos()], -1)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


_POSITION_PARTS: dict[type, type[Part]] = {
    LearnedPositions: PosEmbed,
    ShortformerPositions: HeadPosEmbed,
    SinusoidalPositions: SinusoidalPosEmbed,
}


def embeds_positions(cfg: HookedConfig) -> bool:
    """Whether the positions of a network are vectors, of a part of their own."""
    return type(cfg.positions) in _POSITION_PARTS


def find_position_part(cfg: HookedConfig) -> type[Part]:
    """The class of the part that makes them."""
    return _POSITION_PARTS[type(cfg.positions)]


_UNEMBED_BIASED = When(lambda cfg: cfg.unembed_bias, "its unembedding has no bias")


class Unembed(Part, place="unembed"):
    """Logits `(x W_U + b_U) * logits_scale`, before an output soft cap."""

    proj: nn.Linear
    W_U: Float[Tensor, "d_model d_vocab_out"] = weight(
        "d_model d_vocab_out", "d_vocab_out d_model", module="proj", reads=True, bias="b_U"
    )
    b_U: Float[Tensor, " d_vocab_out"] | None = weight("d_vocab_out", module="proj", when=_UNEMBED_BIASED)
    # Without a final norm this tensor is the stream itself.
    hook_in: HookPoint = point(STREAM, "input of the unembedding", shared=True)
    hook_out: HookPoint = point("batch pos d_vocab_out", "logits, before an output soft cap")

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], call: Call | None = None
    ) -> Float[Tensor, "batch pos d_vocab_out"]:
        """The logits at the given positions."""
        call = open_call() if call is None else call
        return self.hook_out(self._scale(self._multiply(self.hook_in(x, call), call)), call)

    def listens(self, call: Call) -> bool:
        """Whether somebody listens in the unembedding."""
        inside = (linear for linear in self._modules.values() if isinstance(linear, Adapted))
        return self.hook_in.listens(call) or self.hook_out.listens(call) or any(one.listens(call) for one in inside)

    def final_logits(
        self, x: Float[Tensor, "*axes d_model"], outputs: Int[Tensor, " output"] | None = None
    ) -> Float[Tensor, "*axes outputs"]:
        """What a call gives for the final norm's output, soft cap included; hook points do not fire.

        Args:
            x: the output of the final norm.
            outputs: some of the outputs; None: all.
        """
        if outputs is None:
            return self.cap(self._scale(self._multiply(x)))
        bias = None if self.b_U is None else self.b_U[outputs]
        return self.cap(self._scale(F.linear(self._narrow(x), self.W_U.T[outputs], bias)))

    def cap(self, logits: Float[Tensor, "*axes outputs"]) -> Float[Tensor, "*axes outputs"]:
        """Logits under the network's soft cap."""
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def directions(self) -> Float[Tensor, "d_model d_vocab_out"]:
        """The map from the width of the stream, without a scale; `W_U` itself where it is that."""
        return self.W_U

    def _scale(self, logits: Tensor) -> Tensor:
        return logits if self.cfg.logits_scale == 1 else logits * self.cfg.logits_scale

    def _multiply(self, x: Tensor, call: Call | None = None) -> Tensor:
        return apply_linear(self._modules["proj"], self._narrow(x, call), call)

    def _narrow(self, x: Tensor, call: Call | None = None) -> Tensor:
        """The stream in the width that `W_U` reads."""
        return x


class TiedUnembed(Unembed):
    """An unembedding whose `W_U` is the embedding's `W_E`, transposed: one parameter, with one gradient.

    A bias is its own.
    """

    b_U: Float[Tensor, " d_vocab_out"] | None = weight("d_vocab_out", when=_UNEMBED_BIASED)

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        self.__dict__["_embed"] = None
        if "b_U" in self.absent:
            self.register_parameter("b_U", None)

    def _make_weights(self, spec: HookedConfig, present: list[Weight]) -> None:
        # `W_U` is read from the embedding.
        own = [one for one in present if one.name != "W_U"]
        self.shapes = {one.name: self.shapes[one.name] for one in own}
        super()._make_weights(spec, own)

    def tie(self, embed: Embed) -> None:
        """Say which embedding it is tied to."""
        # Past nn.Module's registration: the embedding is no child of the unembedding.
        self.__dict__["_embed"] = embed

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab_out"]:  # type: ignore[override]  # noqa: N802
        """The transposed embedding, without what adapters beside it add: these act where tokens are looked up."""
        embed: Embed = self.__dict__["_embed"]
        table = embed._modules["table"]
        if isinstance(table, Adapted):
            base: Any = table.base_layer
            weight: Tensor = base.weight
            return weight.T
        return embed.W_E.T

    def _multiply(self, x: Tensor, call: Call | None = None) -> Tensor:
        return F.linear(self._narrow(x, call), self.W_U.T, self._parameters["b_U"])


class ProjectedUnembed(Unembed):
    """An unembedding that reads the stream in the width of the token embedding, `(x W_proj_out) W_U`."""

    proj_out: nn.Linear
    W_U: Float[Tensor, "d_embed d_vocab_out"] = weight(
        "d_embed d_vocab_out", "d_vocab_out d_embed", module="proj", bias="b_U"
    )
    W_proj_out: Float[Tensor, "d_model d_embed"] = weight(
        "d_model d_embed", "d_embed d_model", module="proj_out", reads=True
    )

    def directions(self) -> Float[Tensor, "d_model d_vocab_out"]:
        """`W_proj_out W_U`, computed."""
        return self.W_proj_out @ self.W_U

    def _narrow(self, x: Tensor, call: Call | None = None) -> Tensor:
        return apply_linear(self._modules["proj_out"], x, call)


class TiedProjectedUnembed(TiedUnembed, ProjectedUnembed):  # type: ignore[override]
    """The same with the token embedding itself as `W_U`."""


def embed_class(cfg: HookedConfig) -> type[Embed]:
    """The embedding of a network."""
    return Embed if cfg.d_embed is None else ProjectedEmbed


def unembed_class(cfg: HookedConfig) -> type[Unembed]:
    """The unembedding of a network."""
    if cfg.d_embed is None:
        return TiedUnembed if cfg.tied_unembed else Unembed
    return TiedProjectedUnembed if cfg.tied_unembed else ProjectedUnembed
