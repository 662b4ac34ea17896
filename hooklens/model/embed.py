"""Embedding, learned positions, unembedding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.config import HookedConfig, LearnedPositions
from hooklens.hooks import HookedModule, HookPoint
from hooklens.weights.layout import empty_weight


class Embed(HookedModule):
    """Token embedding `W_E [d_vocab, d_model]`, times `embed_scale` where the model has one."""

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__()
        self.scale = cfg.embed_scale
        self.W_E = nn.Parameter(empty_weight("W_E", [cfg.d_vocab, cfg.d_model]))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The row of `W_E` of each token."""
        embedded = F.embedding(tokens, self.W_E)
        if self.scale is None:
            return embedded
        # The factor is rounded to the weights' dtype, as models with one are trained.
        return embedded * torch.tensor(self.scale, dtype=embedded.dtype, device=embedded.device)


class PosEmbed(HookedModule):
    """Learned positions `W_pos`, one row per position after `offset` rows."""

    def __init__(self, cfg: HookedConfig, learned: LearnedPositions) -> None:
        super().__init__()
        self.offset = learned.offset
        self.W_pos = nn.Parameter(empty_weight("W_pos", [cfg.n_ctx + learned.offset, cfg.d_model]))

    def forward(self, positions: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The row of `W_pos` of each position."""
        return F.embedding(positions + self.offset, self.W_pos)


class Unembed(HookedModule):
    """Logits `x W_U + b_U`, before an output soft cap."""

    W_U: Float[Tensor, "d_model d_vocab"]

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__()
        self._make_weight(cfg)
        self.b_U = nn.Parameter(empty_weight("b_U", [cfg.d_vocab])) if cfg.unembed_bias else None
        # Without a final norm this tensor is the stream itself.
        self.hook_in = HookPoint(shared=True)
        self.hook_out = HookPoint()

    def _make_weight(self, cfg: HookedConfig) -> None:
        self.W_U = nn.Parameter(empty_weight("W_U", [cfg.d_model, cfg.d_vocab]))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits at the given positions."""
        return self.hook_out(F.linear(self.hook_in(x), self.W_U.T, self.b_U))


class TiedUnembed(Unembed):
    """An unembedding whose `W_U` is the embedding's `W_E`, transposed: one parameter, with one gradient."""

    def __init__(self, cfg: HookedConfig, embed: Embed) -> None:
        super().__init__(cfg)
        # Past nn.Module's registration: the embedding is no child of the unembedding.
        self.__dict__["_embed"] = embed

    def _make_weight(self, cfg: HookedConfig) -> None:
        """Nothing to make: `W_U` is read from the embedding."""

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # type: ignore[override]  # noqa: N802
        """The transposed embedding."""
        embed: Embed = self.__dict__["_embed"]
        return embed.W_E.T
