r"""How fresh weights are drawn, by name.

Biases are 0, norms act as 1, and every other weight is drawn around 0 with a standard deviation of its own (a uniform
one reaches to `sqrt(3)` times that). With `D` the width of the stream, and `a` and `b` the sizes of what a weight reads
and of what it gives (`fans`):

| scheme | standard deviation | source |
|---|---|---|
| `"gpt2"` | `cfg.init_std`; of what a branch writes `cfg.init_std / sqrt(2 L)`, `L` layers | Radford et al. 2019 |
| `"xavier_uniform"`, `"xavier_normal"` | `sqrt(2 / (a + b))` | Glorot and Bengio 2010 |
| `"kaiming_uniform"`, `"kaiming_normal"` | `sqrt(2 / a)` | He et al. 2015 |
| `"muP"` | embeddings 1, unembedding `1 / a`, others `1 / sqrt(a)` | Yang et al. 2021 |
| `"small"` | `sqrt(2 / (5 D))` | Nguyen and Salazar 2019 |
| `"wang"` | as `"small"`; of what a branch writes `2 / (N sqrt(D))`, `N` branches | Wang 2021 (mesh-transformer-jax) |

`"muP"` goes with an optimizer that has a learning rate for each kind of weight. What a branch writes to the stream is
what its part declares so (`weight(..., writes=True)`).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hooklens.config import HookedConfig, InitScheme
from hooklens.model.parts.declared import Weight
from hooklens.model.parts.part import Part

_BLOCKS = "blocks."
_HEADS = ("head", "kv_head")
_UNIFORM = ("xavier_uniform", "kaiming_uniform")


def fans(axes: Sequence[str], shape: Sequence[int]) -> tuple[int, int]:
    """The sizes of what a weight reads and of what it gives, as TransformerLens counts them.

    These are the last axis but one and the last of the logical shape. What is given counts over all heads, what is read
    does not: `W_O` reads one head's `d_head`. A table of embeddings reads a token, of `d_vocab` rows. A vector reads
    one number. Maps that stand beside each other (of experts) count one by one.
    """
    if len(shape) == 1:
        return 1, shape[0]
    n_heads = math.prod(size for axis, size in zip(axes, shape[:-2], strict=False) if axis in _HEADS)
    return shape[-2], n_heads * shape[-1]


def initialize(decoder: Part, scheme: InitScheme, generator: torch.Generator | None) -> None:
    """Draw all weights of a network, part by part, on the host: the same numbers on any device and in any dtype.

    Args:
        decoder: the network.
        scheme: see the head of this module.
        generator: a generator on the host; None: torch's own.
    """
    n_branches = count_branches(decoder.cfg)
    for path, part in decoder.named_modules():
        if isinstance(part, Part):
            in_block = path.startswith(_BLOCKS)
            part.draw_weights(partial(_draw, decoder.cfg, scheme, generator, in_block=in_block, n_branches=n_branches))


def count_branches(cfg: HookedConfig) -> int:
    """How many branches write to the stream, in all blocks together."""
    writing = [name for name, weight in cfg.description.weights.items() if weight.writes and name.startswith(_BLOCKS)]
    # "blocks.3.mlp" of whatever stands inside of it.
    return len({tuple(name.split(".")[:3]) for name in writing})


def _draw(
    cfg: HookedConfig,
    scheme: InitScheme,
    generator: torch.Generator | None,
    weight: Weight,
    shape: tuple[int, ...],
    *,
    in_block: bool,
    n_branches: int,
) -> Tensor:
    std = _deviation(cfg, scheme, weight, shape, in_block=in_block, n_branches=n_branches)
    blank = torch.empty(shape, dtype=torch.float32, device="cpu")
    if scheme in _UNIFORM:
        return blank.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
    return blank.normal_(0.0, std, generator=generator)


def _deviation(
    cfg: HookedConfig, scheme: InitScheme, weight: Weight, shape: tuple[int, ...], *, in_block: bool, n_branches: int
) -> float:
    """The standard deviation of a weight."""
    ends_branch = in_block and weight.writes
    if scheme == "gpt2":
        return cfg.init_std / max(1, 2 * cfg.n_layers) ** 0.5 if ends_branch else cfg.init_std
    if scheme == "wang" and ends_branch:
        return 2 / n_branches / math.sqrt(cfg.d_model)
    if scheme in ("small", "wang"):
        return math.sqrt(2 / (5 * cfg.d_model))
    reads, gives = fans(weight.axes.split(), shape)
    if scheme == "muP" and not in_block:
        return 1 / reads if weight.reads else 1.0
    if scheme == "muP":
        return 1 / math.sqrt(reads)
    return math.sqrt(2 / (reads + gives if scheme.startswith("xavier") else reads))
