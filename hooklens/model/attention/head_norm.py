"""Norms of queries and keys with a weight for each head, of each head by itself or of all heads together."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.hooks import Call
from hooklens.hooks.spread import SpreadPoint
from hooklens.model.norm import Norm, NormSpec
from hooklens.precision import widen

PerHead = Float[Tensor, "*axes heads d_head"]

# The last axes, heads and entries.
_ALL_HEADS = (-2, -1)


class HeadNorm(Norm):
    """A norm of queries or keys `[batch pos heads d_head]` with weights `[heads d_head]`.

    Over each head by itself, or over all heads together; then `hook_scale` shows the one denominator beside each head,
    and an edit of a head's acts on that head.

    Of keys it may be given a copy for each query head: those of a group have the weights of their key-value head, and
    a norm over all heads goes over all copies.

    Attributes:
        spread: how processes share the heads; they are normed together all the same, by each process.
    """

    spread: SpreadPoint | None = None

    def __init__(self, spec: NormSpec, *, place: str | None = None) -> None:
        super().__init__(spec, place=place)
        self._over_all = spec.cfg.qk_norm_over == "all_heads"
        self._axes = _ALL_HEADS if self._over_all else _ALL_HEADS[-1:]

    def forward(self, x: PerHead, call: Call | None = None) -> PerHead:
        """Normalize, showing listeners what they asked for."""
        spread = self.spread
        return super().forward(x, call) if spread is None else spread.scatter(super().forward(spread.gather(x), call))

    def apply_beside(self, x: PerHead, call: Call) -> PerHead:
        """The norm of what stands beside its input in a call; hook points do not fire."""
        spread = self.spread
        if spread is None:
            return super().apply_beside(x, call)
        return spread.scatter(super().apply_beside(spread.gather(x), call))

    def apply_weights(self, x: PerHead) -> PerHead:
        """The norm as a plain function; hook points do not fire."""
        wide = widen(x)
        size = tuple(x.shape[axis] for axis in self._axes)
        if self.norm.kind == "layer":
            normalized = F.layer_norm(wide, size, None, None, self.norm.eps)
        else:
            normalized = F.rms_norm(wide, size, None, self.norm.eps)
        return self._weigh(normalized).to(x.dtype)

    def apply_holding_scale(self, x: PerHead) -> PerHead:
        """The norm as a plain function through whose denominator no gradient goes; hook points do not fire."""
        centred, scale = self._run_parts(widen(x))
        return self._weigh(centred / scale.detach()).to(x.dtype)

    def _run_parts(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """What is divided, and the denominator."""
        centred = wide - wide.mean(self._axes, keepdim=True) if self.norm.kind == "layer" else wide
        return centred, (centred.pow(2).mean(self._axes, keepdim=True) + self.norm.eps).sqrt()

    def _weigh(self, normalized: PerHead) -> PerHead:
        """Weight and bias."""
        gain, bias = self._gain(), self._parameters["b"]
        scaled = normalized if gain is None else normalized * _like(gain, normalized)
        return scaled if bias is None else scaled + _like(bias, normalized)

    def _forward_watched(self, x: Tensor, call: Call) -> Tensor:
        centred, scale = self._run_parts(widen(x))
        # A number of its own beside each head, which an edit can change alone.
        scale = scale.expand(*x.shape[:-1], 1).contiguous()
        changed = False
        if self.hook_scale.listens(call):
            scale, changed = self.hook_scale.watch(scale, call)
        listens = self.hook_normalized.listens(call)
        if not (changed or listens):
            return self.apply_weights(x)
        normalized = (centred / scale).to(x.dtype)
        if listens:
            normalized, edited = self.hook_normalized.watch(normalized, call)
            changed = changed or edited
        return self._weigh(widen(normalized)).to(x.dtype) if changed else self.apply_weights(x)


def _like(weight: Float[Tensor, "heads d_head"], x: Float[Tensor, "*axes more_heads d_head"]) -> Tensor:
    """Weights in the dtype of what they act on, and for as many heads."""
    copies = x.shape[-2] // len(weight)
    weight = weight.to(x.dtype)
    return weight if copies == 1 else weight.repeat_interleave(copies, 0)
