r"""Steering vectors from contrastive prompts.

With `x_i` the mean activation of prompt `i` over the tokens that count, every prompt counting alike:

- `"mean_difference"`: `mean_{positive} x - mean_{negative} x` (Rimsky et al. 2023, arXiv 2312.06681: contrastive
  activation addition; Marks and Tegmark 2023).
- `"pca"`: the first principal axis of the differences of pairs `d_i = x_i^+ - x_i^-`, each taken with both signs
  (Zou et al. 2023, "Representation Engineering", draws a sign for each, so that the mean of the differences counts as
  variance; both signs are what that comes to on average, and nothing is drawn). It points to the positive side, and is
  as long as the mean difference along it.

Sums are taken in float64, batch by batch: memory does not grow with the number of prompts.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_one_of, reads, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.prefix import Text
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.vectors import choose_vectors
from hooklens.patching.runs.checks import check_model
from hooklens.precision import wide_dtype
from hooklens.steering.activations import (
    Positions,
    Prompts,
    average_chosen,
    encode_prompts,
    is_masks,
    run_batches,
)
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import Provenance
from hooklens.steering.vectors import SteeringVector, SteeringVectors

Method = Literal["mean_difference", "pca"]

Means = dict[str, Float[Tensor, "groups d"]]


@reads(
    SteeringError,
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    method=partial(read_one_of, options=("mean_difference", "pca")),
    edits=read_edits,
    prepend_bos=optional(read_flag),
    progress=read_flag,
)
def fit(
    model: HookedCausalLM,
    positive: Sequence[Text],
    negative: Sequence[Text],
    *,
    at: NamesFilter = "resid_post",
    method: Method = "mean_difference",
    positions: Positions = -1,
    questions: Sequence[Text] | None = None,
    edits: Sequence[Edit] = (),
    batch_size: BatchSize = "auto",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> SteeringVectors:
    """Steering vectors from prompts that show a behaviour and prompts that do not, at all hook points in one pass.

    Args:
        model: runs the prompts.
        positive: prompts with the behaviour: texts, or rows of token ids.
        negative: prompts without it; for `"pca"` the partner of each positive one, in their order.
        at: hook points with a vector at each token: a word such as `"resid_post"` (every layer), a name, a glob, or a
            list of them.
        method: `"mean_difference"` or `"pca"`.
        positions: the tokens that count: token positions (negative ones from a prompt's end), None for all,
            `"answer"` for all tokens behind the question, or a list with a mask for each prompt (all positive ones,
            then all negative ones).
        questions: what stands before each prompt, which is then the answer to it; one for each positive and, in the
            same order, each negative prompt.
        edits: act in the runs, so that what is measured is an edited model.
        batch_size: prompts at once; `"auto"`: by memory.
        prepend_bos: for prompts that are text; None is the model's `default_prepend_bos`.
        progress: show a progress bar.

    Raises:
        SteeringError: no prompts, prompts that do not fit the model, positions that a prompt does not have, or no
            partner for each prompt where they are compared pair by pair.
        HookNameError: `at` selects nothing.
    """
    check_batch_size(batch_size)
    check_model(model, allow_training=False)
    names = choose_vectors(model, at, what="at", error=SteeringError)
    masks = _split_masks(positions, positive, negative)
    encode = partial(encode_prompts, model, questions=questions, prepend_bos=prepend_bos)
    sides = (
        encode(positive, what="positive", positions=masks[0]),
        encode(negative, what="negative", positions=masks[1]),
    )
    if method == "pca" and len(sides[0]) != len(sides[1]):
        raise SteeringError(
            f"method='pca' compares pairs, and there are {len(sides[0])} positive and {len(sides[1])} negative "
            "prompts; give each its partner, or use method='mean_difference'"
        )
    sums = _Sums(model, sides, names, edits=edits, batch_size=batch_size, progress=progress)
    means = sums.means(with_moments=method == "pca")
    provenance = Provenance.of(
        model,
        sides,
        method=method,
        positions="a mask for each prompt" if masks[0] is not positions else show(positions),
        counts=(len(sides[0]), len(sides[1])),
    )
    return SteeringVectors(
        vectors=tuple(
            _make_vector(name, means[0][name], means[1][name], sums.moments.get(name), model, provenance)
            for name in names
        )
    )


def _split_masks(positions: Positions, positive: object, negative: object) -> tuple[Positions, Positions]:
    """Masks of the positive and of the negative prompts; anything else counts for both."""
    if not isinstance(positions, list | tuple) or not is_masks(positions):
        return positions, positions
    sizes = [1 if isinstance(side, str) else len(side) for side in (positive, negative) if isinstance(side, Sized)]
    if sum(sizes) != len(positions):
        raise SteeringError(
            f"positions has {len(positions)} masks; expected one for each of the positive prompts, then one for each "
            f"of the negative ones, {sum(sizes)} in all"
        )
    return positions[: sizes[0]], positions[sizes[0] :]


@dataclass(eq=False, kw_only=True)
class _Totals:
    """Sums over the prompts of one side."""

    n: int = 0
    total: Means = field(default_factory=dict)


class _Sums:
    """What vectors are computed from, summed up batch by batch.

    Attributes:
        moments: by name, `sum_i d_i d_i^T` over pairs, `[groups d d]`; empty where it was not asked for.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        sides: tuple[Prompts, Prompts],
        names: list[str],
        *,
        edits: Sequence[Edit],
        batch_size: BatchSize,
        progress: bool,
    ) -> None:
        self._model, self._sides, self._names = model, sides, names
        self._options = {"edits": edits, "batch_size": batch_size, "progress": progress}
        self.moments: dict[str, Float[Tensor, "groups d d"]] = {}

    def means(self, *, with_moments: bool) -> tuple[Means, Means]:
        """The mean activation of the positive and of the negative prompts."""
        totals = (_Totals(), _Totals())
        if not with_moments:
            for total, side in zip(totals, self._sides, strict=True):
                for _, batch, found in self._run(side):
                    self._add(total, {name: average_chosen(one, batch.chosen) for name, one in found.items()})
        else:
            self._sum_pairs(totals)
        positive, negative = ({name: one / side.n for name, one in side.total.items()} for side in totals)
        return positive, negative

    def _run(self, side: Prompts):  # type: ignore[no-untyped-def]
        return run_batches(self._model, side, self._names, what="fitting", **self._options)  # type: ignore[arg-type]

    def _sum_pairs(self, totals: tuple[_Totals, _Totals]) -> None:
        """Positive prompts in batches, each followed by their partners."""
        for indices, batch, found in self._run(self._sides[0]):
            first = {name: average_chosen(one, batch.chosen) for name, one in found.items()}
            options = {**self._options, "batch_size": len(indices), "progress": False}
            second = {name: torch.empty_like(one) for name, one in first.items()}
            partners = self._sides[1].take(indices)
            for places, other, found_there in run_batches(self._model, partners, self._names, **options):  # type: ignore[arg-type]
                for name, one in found_there.items():
                    second[name][places] = average_chosen(one, other.chosen)
            for total, side in zip(totals, (first, second), strict=True):
                self._add(total, side)
            for name in self._names:
                away = first[name] - second[name]
                moment = torch.einsum("bgd,bge->gde", away, away)
                self.moments[name] = self.moments[name] + moment if name in self.moments else moment

    def _add(self, totals: _Totals, found: dict[str, Float[Tensor, "batch groups d"]]) -> None:
        totals.n += len(next(iter(found.values())))
        for name, one in found.items():
            totals.total[name] = totals.total[name] + one.sum(0) if name in totals.total else one.sum(0)


def _make_vector(
    name: str,
    positive: Float[Tensor, "groups d"],
    negative: Float[Tensor, "groups d"],
    moment: Float[Tensor, "groups d d"] | None,
    model: HookedCausalLM,
    provenance: Provenance,
) -> SteeringVector:
    direction, share = positive - negative, None
    if moment is not None:
        values, axes = torch.linalg.eigh(moment)
        axis = axes[..., -1]
        # Along the mean difference, and as long as that is along it.
        direction = axis * (direction * axis).sum(-1, keepdim=True)
        # A trace of 0: all differences are zero, and none lies anywhere.
        share = values[..., -1] / values.sum(-1)
    unit = torch.nn.functional.normalize(direction, dim=-1, eps=torch.finfo(direction.dtype).tiny)
    levels = torch.stack([(negative * unit).sum(-1), (positive * unit).sum(-1)])
    has_heads = len(model.cfg.description.points[name].axes) > 3
    dtype = wide_dtype(model.dtype)

    def shape(tensor: Tensor, axis: int) -> Tensor:
        return (tensor if has_heads else tensor.squeeze(axis)).to(dtype)

    return SteeringVector(
        name=name,
        direction=shape(direction, 0),
        levels=shape(levels, 1),
        share=None if share is None else shape(share, 0),
        provenance=provenance,
    )
