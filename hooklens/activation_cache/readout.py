"""What is read of each component of the stream: its vector, the norm of it, or numbers along directions.

A norm is not linear, but with its denominator held at the value it had in the run it is:

    norm(x) = (x - mean(x)) / scale * gain + bias        (an RMSNorm has no mean and no bias)

so the parts of `x` go through it one by one and their sum, plus `bias`, is the norm's true output. For the
same reason a direction can be pulled back through it, `<norm(x) - bias, d> = <x, centre(gain * d)> / scale`,
and a component that is a product (a head's `z W_O`, a neuron's `post W_out`) is projected by projecting its
weights first: nothing of size components x positions x d_model is made.

Arithmetic is in the precision of the activations, but at least in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.stream import StreamPoint, require, require_weight, take_positions
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice
from hooklens.precision import wide_dtype, widen


def like(weight: Float[Tensor, "..."], activation: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A weight where an activation is, in the precision that its sums are taken in."""
    return weight.to(activation.device, wide_dtype(activation.dtype))


@dataclass(frozen=True, kw_only=True)
class FrozenNorm:
    """A norm with its denominator held fixed; see the module.

    Attributes:
        scale: the denominator at each position.
        gain: what each entry is multiplied with.
        bias: what is added in the end; no part of a component's share.
        centres: whether the mean is subtracted.
    """

    scale: Float[Tensor, "*batch_pos one"]
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centres: bool

    def apply(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """A component's share of the norm's output, without the bias."""
        return self._centre(widen(x)) / self.scale * self.gain

    def apply_to_whole(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The norm's output for a whole stream, its bias included."""
        return self.apply(x) if self.bias is None else self.apply(x) + self.bias

    def pull_back(self, directions: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Directions whose product with `x`, over `scale`, is the product of the given ones with `apply(x)`."""
        return self._centre(directions * self.gain)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x


def freeze_norm(cache: CapturedActivations, norm: str, *, pos_slice: Choice = None, purpose: str) -> FrozenNorm:
    """The norm called `norm` (`"ln_final"`, `"blocks.3.ln1"`) with the denominator it had in the run.

    Raises:
        MissingActivationError: its `hook_scale` was not captured.
        CacheError: the cache has no weights.
    """
    point = f"{norm}.hook_scale"
    require(cache, [point], purpose=purpose)
    scale = widen(take_positions(cache[point], -2, pos_slice))
    kind = cache.cfg.description.norms[norm]
    gain = like(require_weight(cache, f"{norm}.w"), scale) if kind.weight else scale.new_ones(cache.cfg.d_model)
    return FrozenNorm(
        scale=scale,
        gain=1 + gain if kind.unit_offset else gain,
        bias=like(require_weight(cache, f"{norm}.b"), scale) if kind.bias else None,
        centres=kind.kind == "layer",
    )


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How the components of a decomposition are read.

    Attributes:
        pos_slice: the positions.
        norm: read them through this norm.
        directions: read their products with these directions, `n` numbers in the place of the vector;
            leading axes broadcast with batch and pos.
    """

    pos_slice: Choice = None
    norm: FrozenNorm | None = None
    directions: Float[Tensor, "*batch_pos n d_model"] | None = None

    def read_vectors(self, x: Float[Tensor, "... pos d_model"]) -> Float[Tensor, "... read"]:
        """What is read of vectors of the stream; they keep their dtype if they are read as they are."""
        return self.read_taken(take_positions(x, -2, self.pos_slice))

    def read_taken(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... read"]:
        """The same for vectors whose positions have been taken."""
        if self.norm is not None:
            x = self.norm.apply(x)
        if self.directions is None:
            return x
        return torch.einsum("...d,...nd->...n", widen(x), self._directions_like(x))

    def read_products(
        self,
        factors: Float[Tensor, "*batch_pos part inner"],
        weight: Float[Tensor, "part inner d_model"],
        exit_norm: FrozenNorm | None,
    ) -> Float[Tensor, "part *batch_pos read"]:
        """What is read of components that are products of activations and weights.

        Args:
            factors: the activations of each component, positions taken.
            weight: the map of each component into the stream.
            exit_norm: a norm between the map and the stream.
        """
        weight = like(weight, factors)
        factors = widen(factors)
        if self.directions is None:
            vectors = torch.einsum("...kh,khd->k...d", factors, weight)
            return self.read_taken(vectors if exit_norm is None else exit_norm.apply(vectors))
        directions = self._directions_like(factors)
        for norm in (self.norm, exit_norm):
            directions = directions if norm is None else norm.pull_back(directions)
        projected = torch.einsum("khd,...nd->...khn", weight, directions)
        values = torch.einsum("...kh,...khn->k...n", factors, projected)
        for norm in (self.norm, exit_norm):
            values = values if norm is None else values / norm.scale
        return values

    def _directions_like(self, activation: Tensor) -> Tensor:
        assert self.directions is not None
        return like(self.directions, activation)


def make_readout(
    cache: CapturedActivations,
    point: StreamPoint,
    *,
    purpose: str,
    names: Iterable[str],
    apply_ln: bool = False,
    pos_slice: Choice = None,
    project_output_onto: Tensor | None = None,
) -> Readout:
    """How to read components that end at a place; with `apply_ln` through the norm that reads the stream there.

    Args:
        cache: what they are read from.
        point: the place.
        purpose: who reads them, for messages.
        names: the activations that will be read; all that are missing are told here, with the norm's scale.
        apply_ln, pos_slice, project_output_onto: see `ActivationCache`.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError: the directions have a wrong shape, or the cache has no weights.
    """
    read_through = point.norm if apply_ln else None
    scale = [] if read_through is None else [f"{read_through}.hook_scale"]
    require(cache, dict.fromkeys([*names, *scale]), purpose=purpose)
    norm = None if read_through is None else freeze_norm(cache, read_through, pos_slice=pos_slice, purpose=purpose)
    directions = _check_projection(project_output_onto, cache.cfg.d_model)
    return Readout(pos_slice=pos_slice, norm=norm, directions=directions)


def _check_projection(directions: Tensor | None, d_model: int) -> Tensor | None:
    """Directions `[d_model]` or `[d_model, n]` as `[n, d_model]`.

    Raises:
        CacheError: another shape, or not a tensor of real numbers.
    """
    if directions is None:
        return None
    found = "" if isinstance(directions, Tensor) else f"is a {type(directions).__name__}"
    if not found and (directions.is_complex() or directions.dtype == torch.bool):
        found = f"is {directions.dtype}"
    if not found and (directions.ndim not in (1, 2) or directions.shape[0] != d_model):
        found = f"has shape {list(directions.shape)}"
    if found:
        raise CacheError(
            f"project_output_onto {found}; expected [{d_model}] or [{d_model}, n]: directions of the stream as columns"
        )
    return directions[None] if directions.ndim == 1 else directions.T
