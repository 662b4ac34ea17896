"""Embedding, learned positions, unembedding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.config import HookedConfig, LearnedPositions
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.model.declared import Weight, When, point, weight
from hooklens.model.part import Part, apply_linear


class _Table(Part):
    """A part that looks rows up in a table, an `nn.Embedding`."""

    table: nn.Embedding

    def _make_holder(self, sizes: list[int], *, bias: bool) -> nn.Module:
        return nn.Embedding(sizes[0], sizes[1], _weight=torch.empty(sizes))

    def _look_up(self, rows: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        found: Tensor = self.table(rows)
        return found


class Embed(_Table, place="embed"):
    """Token embedding `W_E [d_vocab, d_model]`, times `embed_scale` where the model has one."""

    W_E: Float[Tensor, "d_vocab d_model"] = weight("d_vocab d_model", module="table", writes=True)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The row of `W_E` of each token."""
        embedded = self._look_up(tokens)
        if self.cfg.embed_scale is None:
            return embedded
        # The factor is rounded to the weights' dtype, as models with one are trained.
        return embedded * torch.tensor(self.cfg.embed_scale, dtype=embedded.dtype)


class PosEmbed(_Table, place="pos_embed"):
    """Learned positions `W_pos`, one row per position after `offset` rows."""

    W_pos: Float[Tensor, "position d_model"] = weight("position d_model", module="table", writes=True)

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.positions, LearnedPositions)
        self.offset = cfg.positions.offset

    def forward(self, positions: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The row of `W_pos` of each position."""
        return self._look_up(positions + self.offset if self.offset else positions)


class Unembed(Part, place="unembed"):
    """Logits `x W_U + b_U`, before an output soft cap."""

    proj: nn.Linear
    W_U: Float[Tensor, "d_model d_vocab"] = weight(
        "d_model d_vocab", "d_vocab d_model", module="proj", reads=True, bias="b_U"
    )
    b_U: Float[Tensor, " d_vocab"] | None = weight(
        "d_vocab", module="proj", when=When(lambda cfg: cfg.unembed_bias, "its unembedding has no bias")
    )
    # Without a final norm this tensor is the stream itself.
    hook_in: HookPoint = point("batch pos d_model", "input of the unembedding", shared=True)
    hook_out: HookPoint = point("batch pos d_vocab", "logits, before an output soft cap")

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], call: Call | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits at the given positions."""
        call = open_call() if call is None else call
        return self.hook_out(self._multiply(self.hook_in(x, call)), call)

    def _multiply(self, x: Tensor) -> Tensor:
        return apply_linear(self._modules["proj"], x)


class TiedUnembed(Unembed):
    """An unembedding whose `W_U` is the embedding's `W_E`, transposed: one parameter, with one gradient."""

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        self.__dict__["_embed"] = None

    def _make_weights(self, spec: HookedConfig, present: list[Weight]) -> None:
        """Nothing to make: `W_U` is read from the embedding."""
        self.shapes = {}

    def tie(self, embed: Embed) -> None:
        """Say which embedding it is tied to."""
        # Past nn.Module's registration: the embedding is no child of the unembedding.
        self.__dict__["_embed"] = embed

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # type: ignore[override]  # noqa: N802
        """The transposed embedding."""
        embed: Embed = self.__dict__["_embed"]
        return embed.W_E.T

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_U.T)
