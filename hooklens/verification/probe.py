"""What the checks run the model on, and how far rounding alone can move its logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.axes import EMBEDDINGS, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.hooks.names import is_by_name_only

PaddingSide = Literal["left", "right"]

# A tensor computed in another order of operations differs by a few units in the last place where one such
# unit was tried, and the units of several places add up.
ROUNDING_FACTOR = 8.0
_MANY_LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A seeded input for a model, and the hook points to check on it.

    Attributes:
        model: the model under verification.
        tokens: random token ids, without padding.
        lengths: how many tokens of each row the padded batches keep; rows differ, the longest is whole.
        layers: the blocks whose hook points are checked.
        seed: of all random numbers.
        left_out: hook points that are not checked.
    """

    model: HookedCausalLM
    tokens: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    seed: int
    left_out: frozenset[str] = frozenset()

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.tokens.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    @cached_property
    def names(self) -> list[str]:
        """The hook points to check, in the order of the module tree; those of activations."""
        names = [name for name in self.model.hook_points() if name not in self.left_out and not is_by_name_only(name)]
        return [name for name in names if (layer := layer_of(name)) is None or layer in self.layers]

    @property
    def whole_layers(self) -> list[int]:
        """The layers of which no hook point is left out."""
        broken = {layer_of(name) for name in self.left_out}
        return [layer for layer in self.layers if layer not in broken]

    @cached_property
    def clean_logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of a plain call."""
        return self.run()

    @cached_property
    def clean_captures(self) -> dict[str, Tensor]:
        """What passes each of `names` in a call that only watches."""
        with self.model.capture(self.names) as captured:
            self.run()
        return captured

    def run(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of the unpadded batch under whatever hooks are attached."""
        # Random ids may hold a pad id at a row's end: here they are all tokens.
        return as_logits(self.model(self.tokens, attention_mask=torch.ones_like(self.tokens)))

    def rows(self) -> Iterator[Int[Tensor, "one pos"]]:
        """The rows of the padded batches as inputs of their own, without padding."""
        for row, length in zip(self.tokens, self.lengths, strict=True):
            yield row[None, :length]

    def repeat(self, times: int) -> "Probe":
        """A probe of so many times the rows, of the same lengths, each of other random tokens."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (times * len(self.lengths), self.n_tokens)
        tokens = torch.randint(0, self.model.cfg.d_vocab, shape, generator=generator).to(self.tokens.device)
        return replace(self, tokens=tokens, lengths=self.lengths * times)

    def pad(self, side: PaddingSide) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """The rows as one batch, and its attention mask. Padding is filled with a real token id."""
        tokens = torch.zeros_like(self.tokens)
        mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        for index, row in enumerate(self.rows()):
            length = row.shape[1]
            columns = slice(0, length) if side == "right" else slice(self.n_tokens - length, None)
            tokens[index, columns] = row[0]
            mask[index, columns] = True
        return tokens, mask

    @cached_property
    def rounding(self) -> float:
        """How far the logits may move when one tensor is computed in another order of operations.

        Measured on the model itself, since depth and the size of its activations decide it: every tensor that
        enters the stream is changed by a random unit in the last place, and the largest change of a logit
        counted several times. Never less than a few units in the last place of the largest logit.
        """
        generator = torch.Generator().manual_seed(self.seed)
        eps = torch.finfo(self.dtype).eps

        def add_unit(tensor: Tensor, hook: HookPoint) -> Tensor:
            sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
            return tensor * (1 + eps * sign)

        words = (*EMBEDDINGS, "hook_attn_out", "hook_mlp_out")
        writers = [name for name in self.model.hook_points() if name.rpartition(".")[2] in words]
        # Before the hooks are in place, which the first run would hear.
        moved, clean = 0.0, self.clean_logits
        for _ in range(2):
            with self.model.hooks([(writers, add_unit)]):
                moved = max(moved, largest_difference(self.run(), clean))
        return ROUNDING_FACTOR * max(moved, eps * float(clean.abs().max()))


def make_probe(
    model: HookedCausalLM, *, layers: Sequence[int] | None = None, n_tokens: int = 20, seed: int = 0
) -> Probe:
    """A probe for `model`.

    Args:
        model: the model to verify.
        layers: blocks whose hook points to check; None: all of a small model, the first, middle and last of
            a model of more than four.
        n_tokens: length of the longest row, at least 4; at most the model's context is used.
        seed: of all random numbers.

    Raises:
        InputError: layers that the model does not have, too few tokens, dropout in training mode, or hooks attached
            to the model.
    """
    cfg = model.cfg
    if n_tokens < 4:
        raise InputError(f"verify: n_tokens is {n_tokens}; expected at least 4, so that rows of several lengths exist")
    if model.drops:
        raise InputError(
            "verify: the model is in training mode with dropout, so no two runs are alike; call model.eval() first"
        )
    attached = [name for name, point in model.hook_points().items() if point.own is not None]
    if attached:
        raise InputError(
            f"verify: hooks are attached to {len(attached)} hook points, such as {attached[0]!r}, and would be part of "
            "what is verified; remove them: model.reset_hooks(including_permanent=True)"
        )
    if layers is None:
        sample = (0, cfg.n_layers // 2, cfg.n_layers - 1)
        layers = sample if cfg.n_layers > _MANY_LAYERS else range(cfg.n_layers)
    outside = [layer for layer in layers if not 0 <= layer < cfg.n_layers]
    if outside:
        raise InputError(f"verify: layers {outside} do not exist; the model has layers 0 to {cfg.n_layers - 1}")
    length = min(n_tokens, cfg.n_ctx)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, cfg.d_vocab, (3, length), generator=generator).to(model.device)
    lengths = (length, max(1, length - 2), max(1, length // 2))
    return Probe(model=model, tokens=tokens, lengths=lengths, layers=tuple(layers), seed=seed)


def as_logits(output: object) -> Tensor:
    """The output of a call for logits, typed."""
    assert isinstance(output, Tensor)
    return output


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors, computed in float64; equal infinities differ by 0."""
    one, other = one.double(), other.double()
    difference = torch.where(one == other, 0.0, (one - other).abs())
    return float(difference.max()) if difference.numel() else 0.0


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
