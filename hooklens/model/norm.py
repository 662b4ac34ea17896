"""LayerNorm and RMSNorm with hook points on the denominator and on what it divides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import HookedConfig, NormConfig
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.model.attention.kernels import can_show_rms, rms_norm_with_scale
from hooklens.model.parts.declared import ALWAYS, Weight, When, inner, point, weight
from hooklens.model.parts.part import Part
from hooklens.precision import widen

STREAM = "batch pos d_model"


def hold_scale(scale: Tensor, hook: HookPoint) -> Tensor:
    """A hook for `hook_scale` that makes the denominator a constant: the norm then has another gradient.

    A norm knows it, and what is normed beside its input (a copy for one head) has that gradient, too.
    """
    return scale.detach()


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """What a norm is built from.

    Attributes:
        cfg: the network.
        norm: the kind of norm.
        axes: of what it norms, over the last of them.
        where: where it stands, in words.
        n_weighted: how many of the last axes it has weights for.
        size_in: the size of an axis in the part around it; None: in the network.
    """

    cfg: HookedConfig
    norm: NormConfig
    axes: str
    where: str
    n_weighted: int = 1

    @property
    def weighted_axes(self) -> tuple[str, ...]:
        """The axes that it has weights for."""
        return tuple(self.axes.split()[-self.n_weighted :])

    size_in: Callable[[str], int] | None = None

    def size(self, axis: str) -> int:
        """The size of an axis; "..." is the normed one."""
        size = self.size_in or self.cfg.size
        return size(self.axes.split()[-1] if axis == "..." else axis)


class Norm(Part):
    """A norm over the last axis: `(x - mean) / scale * w + b`, or `x / scale * w` for the RMS kind.

    Without weight it ends with the division.

    The fused kernel does the work. With a listener the scale and the normalized tensor are computed
    beside it, in float32 for half-precision inputs, and the output is recomputed from them only when a
    listener changed one. `hook_scale` carries float32 for half-precision inputs.

    Attributes:
        shows_output: `hook_normalized` carries what weight and bias leave, the norm's output, as TransformerLens 2.x's
            LayerNorm has it. Set on a norm, it holds for all calls to come.
    """

    shows_output: bool = False

    w: nn.Parameter | None = weight("...", when=When(lambda spec: spec.norm.weight, "its norms have no weight"))
    b: nn.Parameter | None = weight("...", when=When(lambda spec: spec.norm.bias, "its norms have no bias"))
    hook_scale: HookPoint = point("... one", "the norm's denominator")
    hook_normalized: HookPoint = point("...", "after centring and scaling, before weight and bias")

    def __init__(self, spec: NormSpec, *, place: str | None = None) -> None:
        super().__init__(spec, place=place)
        self.norm = spec.norm
        self.size = (spec.size("..."),)
        # Weight and bias are what the kernels take.
        self._weighs_directly = not (spec.norm.wide_weight or spec.norm.unit_offset)
        for name in {"w", "b"} & set(self.absent):
            self.register_parameter(name, None)

    def initialize(self) -> None:
        """Make the norm's weight act as 1 and its bias as 0."""
        if self.w is not None:
            nn.init.constant_(self.w, 0.0 if self.norm.unit_offset else 1.0)
        if self.b is not None:
            nn.init.zeros_(self.b)

    def draw_weights(self, draw: Callable[[Weight, tuple[int, ...]], Tensor]) -> None:
        """Nothing is drawn; see `initialize`."""
        self.initialize()

    def listens(self, call: Call) -> bool:
        """Whether somebody listens inside the norm."""
        return self.hook_scale.listens(call) or self.hook_normalized.listens(call)

    def forward(self, x: Float[Tensor, "*axes size"], call: Call | None = None) -> Float[Tensor, "*axes size"]:
        """Normalize, showing listeners what they asked for."""
        call = open_call() if call is None else call
        if call.hears(self.hook_scale) or call.hears(self.hook_normalized):
            return self._forward_watched(x, call)
        return self.apply_weights(x)

    def apply_weights(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """The norm as a plain function; hook points do not fire."""
        norm = self.norm
        wide = widen(x) if norm.wide_weight else x
        # The functions behind those of torch.nn.functional, which take their time.
        if norm.kind == "layer":
            out = torch.layer_norm(wide, self.size, self._gain(), self._bias(), norm.eps)
        else:
            out = torch.rms_norm(wide, self.size, self._gain(), norm.eps)
        return out.to(x.dtype) if norm.wide_weight else out

    def apply_beside(self, x: Float[Tensor, "*axes size"], call: Call) -> Float[Tensor, "*axes size"]:
        """The norm of what stands beside its input in a call; hook points do not fire."""
        return self.apply_holding_scale(x) if self.holds_scale(call) else self.apply_weights(x)

    def holds_scale(self, call: Call) -> bool:
        """Whether `hold_scale` acts in a call."""
        listening = call.listeners.get(self.hook_scale) if call.listeners else None
        return listening is not None and any(hook.source is hold_scale for hook in listening.hooks)

    def apply_holding_scale(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """The norm as a plain function through whose denominator no gradient goes; hook points do not fire."""
        _, mean, scale = self._run_with_statistics(x)
        wide = widen(x) if mean is None else widen(x) - mean
        return self._weigh_divided((wide / scale.detach()).to(x.dtype), x)

    def _gain(self) -> Tensor | None:
        gain: Tensor | None = self._parameters["w"]
        if gain is None or self._weighs_directly:
            return gain
        if self.norm.wide_weight:
            gain = widen(gain)
        return 1.0 + gain if self.norm.unit_offset else gain

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self._parameters["b"]
        return widen(bias) if bias is not None and self.norm.wide_weight else bias

    def _forward_watched(self, x: Tensor, call: Call) -> Tensor:
        out, mean, scale = self._run_with_statistics(x)
        changed, watches_normalized = False, call.hears(self.hook_normalized)
        if call.hears(self.hook_scale):
            scale, changed = self.hook_scale.watch(scale, call)
        if not (changed or watches_normalized):
            return self.apply_weights(x) if out is None else out
        if self.shows_output:
            divided = ((widen(x) if mean is None else widen(x) - mean) / scale).to(x.dtype) if changed else None
            whole = out if divided is None else self._weigh_divided(divided, x)
            whole = self.apply_weights(x) if whole is None else whole
            return self.hook_normalized(whole, call)
        by_kernel = out is not None and not changed and self.norm.kind == "layer"
        normalized, normalized_changed = self._divide(x, mean, scale, by_kernel=by_kernel), False
        if watches_normalized:
            normalized, normalized_changed = self.hook_normalized.watch(normalized, call)
        if not (changed or normalized_changed):
            return self.apply_weights(x) if out is None else out
        weighed = self._weigh_divided(normalized, x)
        if changed:
            return weighed
        with torch.no_grad():
            # Divided anew: a listener may have changed the first one in place.
            is_same = (normalized == self._divide(x, mean, scale, by_kernel=by_kernel)).all(-1, keepdim=True)
            plain = self.apply_weights(x)
        # Vectors that listeners left as they were keep every bit, and gradients go through what they gave.
        kept = plain + (weighed - weighed.detach()) if weighed.requires_grad else plain
        return torch.where(is_same, kept, weighed)

    def _divide(self, x: Tensor, mean: Tensor | None, scale: Tensor, *, by_kernel: bool) -> Tensor:
        """What weight and bias are put on."""
        if by_kernel:
            return torch.native_layer_norm(x, self.size, None, None, self.norm.eps)[0]
        wide = widen(x)
        return ((wide if mean is None else wide - mean) / scale).to(x.dtype)

    def _weigh_divided(self, normalized: Tensor, x: Tensor) -> Tensor:
        """Weight and bias on what was divided, in the dtype of the input."""
        gain, bias = self._gain(), self._bias()
        scaled = normalized if gain is None else normalized * gain
        return (scaled if bias is None else scaled + bias).to(x.dtype)

    def _run_with_statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The output, the mean that is subtracted, and the denominator.

        The output only where the kernel gives its statistics away with it: not with gradients, which stop there, and
        not in half precision, in which they would be rounded.
        """
        wide = widen(x)
        gives_statistics = wide is x and not (torch.is_grad_enabled() and x.requires_grad)
        if self.norm.kind == "rms":
            if gives_statistics and can_show_rms(x, self.size, gain := self._gain()):
                out, inverse_scale = rms_norm_with_scale(x, self.size, gain, self.norm.eps)
                return out, None, inverse_scale.reciprocal()
            return None, None, (wide.pow(2).mean(-1, keepdim=True) + self.norm.eps).sqrt()
        if gives_statistics:
            out, mean, inverse_scale = torch.native_layer_norm(x, self.size, self._gain(), self.b, self.norm.eps)
            return out, mean, inverse_scale.reciprocal()
        mean = wide.mean(-1, keepdim=True)
        return None, mean, ((wide - mean).pow(2).mean(-1, keepdim=True) + self.norm.eps).sqrt()


def norm(
    where: str,
    *,
    axes: str = STREAM,
    kind: Callable[[Any], NormConfig | None] = lambda block: block.norm,
    when: When = ALWAYS,
    n_weighted: Callable[[Any], int] = lambda outer: 1,
    stand_in: Callable[[Any], type[Part] | None] = lambda outer: None,
) -> Any:
    """Declare a norm inside a part.

    Args:
        where: where it stands, in words.
        axes: of what it norms.
        kind: the kind of norm, given the spec of the outer part.
        when: whether a network has it.
        n_weighted: how many of the last axes it has weights for, given the spec of the outer part.
        stand_in: a class with the same hook points that stands there in some networks, likewise.
    """

    def spec_of(outer: Any) -> NormSpec:
        chosen = kind(outer)
        assert chosen is not None
        cfg = outer if isinstance(outer, HookedConfig) else outer.cfg
        return NormSpec(
            cfg=cfg,
            norm=chosen,
            axes=axes,
            where=where,
            n_weighted=n_weighted(outer),
            size_in=outer.size,
        )

    return inner(Norm, spec_of, axes=axes, where=where, when=when, stand_in=stand_in)
