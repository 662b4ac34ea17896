r"""How much steering does, and what it costs: every vector at every strength, effect and damage beside each other.

- *effect*: a metric of prompts (a logit difference, a probability, or a function), mean and standard error over them;
- *damage* on neutral text: `KL(plain || steered)` of the next-token distributions, mean over all tokens, in nats; and
  the perplexity `exp(mean -log p(next token))`.

A batch of prompts runs once without steering. For each vector the stream that enters its block is taken over from that
run, since nothing below differs, and strengths are rows of one batch that starts there. Every row is the edited run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_number, read_one_of, reads, refusal, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.evaluation.batching import BatchSize, check_batch_size, choose_batch_size, plan_batches
from hooklens.evaluation.prefix import Text
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.hooks.edits import Edit
from hooklens.model.plan.positions import LogitsAt
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric, Runs, prepare_metric
from hooklens.patching.results.moments import Moments
from hooklens.patching.runs.checks import check_model
from hooklens.progress import progress_bar
from hooklens.steering.activations import Padded, Prompts, encode_prompts
from hooklens.steering.errors import SteeringError
from hooklens.steering.table import SteeringTable
from hooklens.steering.vectors import SteeringVector, SteeringVectors


@reads(
    SteeringError,
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    vectors=partial(
        require, kind=(SteeringVector, SteeringVectors), expected="steering vectors, as steering.fit gives"
    ),
    how=partial(read_one_of, options=("add", "clamp")),
    prepend_bos=optional(read_flag),
    progress=read_flag,
)
def sweep_strength(
    model: HookedCausalLM,
    vectors: SteeringVector | SteeringVectors,
    prompts: Sequence[Text],
    strengths: Sequence[float],
    effect_metric: Metric | MetricFunction,
    *,
    neutral: Sequence[Text],
    how: Literal["add", "clamp"] = "add",
    pos: Choice = None,
    batch_size: BatchSize = "auto",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> SteeringTable:
    """The effect and the damage of each vector, by itself, at each strength.

    Args:
        model: runs.
        vectors: one or several; each is a row of the table.
        prompts: where the effect is measured.
        strengths: as in `SteeringVector.edits`.
        effect_metric: `patching.LogitDiff(...)`, `LogProb`, `Probability`, ..., whose answers are for all prompts or
            one for each; or a function from logits `[batch pos d_vocab]` to one value per prompt. It is called with all
            prompts at once, in their order, and they need one length, since it cannot tell tokens from padding.
        neutral: text on which the damage is measured, at least two tokens each.
        how: `"add"` the vector, or `"clamp"` the component along it.
        pos: token positions that are steered, in prompts and in neutral text; None: all.
        batch_size: rows at once, a row being a prompt at one strength; `"auto"`: by memory.
        prepend_bos: for prompts that are text.
        progress: show a progress bar.

    Raises:
        SteeringError: arguments that are none, prompts that do not fit or lack a position of `pos`, or vectors of
            another shape or place.
        TransformError: the model's weights were processed otherwise than where the vectors come from.
    """
    check_batch_size(batch_size)
    check_model(model, allow_training=False)
    metric = as_metric(effect_metric)
    listed = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    for vector in listed:
        vector.check(model)
    chosen = _read_strengths(strengths)
    asked = encode_prompts(model, prompts, what="prompts", prepend_bos=prepend_bos)
    plain_text = encode_prompts(model, neutral, what="neutral", prepend_bos=prepend_bos)
    if metric.needs_all_pairs and len(set(asked.lengths)) > 1:
        raise SteeringError(
            f"effect_metric is a function, and prompts have {min(asked.lengths)} to {max(asked.lengths)} tokens; give "
            "prompts of one length, or a metric such as patching.LogitDiff, which knows where each ends"
        )
    if short := [place for place, length in enumerate(plain_text.lengths) if length < 2]:
        raise SteeringError(f"neutral: texts {short[:10]} have one token, which has no successor to predict")
    for what, given in (("prompts", asked), ("neutral", plain_text)):
        _check_positions(pos, given, what)
    steered = [
        [vector.edits(strength=strength, how=how, pos=pos, dtype=model.dtype) for strength in chosen]
        for vector in (one.to(model.device) for one in listed)
    ]
    runs = _Runs(model, listed, steered, batch_size=batch_size)
    total = (len(asked) + len(plain_text)) * (1 + len(listed) * len(chosen))
    with progress_bar("steering", total=total, unit="row", progress=progress) as bar, torch.no_grad():
        effect, plain_effect = _measure_effect(runs, asked, metric, bar.update)
        damage = _measure_damage(runs, plain_text, bar.update)
    shape = (len(listed), len(chosen))
    return SteeringTable(
        names=tuple(one.name for one in listed),
        strengths=chosen,
        metric=metric.name,
        how=how,
        effect=effect.mean.reshape(shape),
        standard_error=effect.standard_errors.reshape(shape),
        kl=(damage.kl / damage.n_tokens).reshape(shape),
        perplexity=(damage.loss[1:] / damage.n_predicted).exp().reshape(shape),
        plain_effect=float(plain_effect.mean[0]),
        plain_perplexity=math.exp(float(damage.loss[0]) / damage.n_predicted),
        n_prompts=len(asked),
        n_neutral_tokens=damage.n_tokens,
        provenance=listed[0].provenance,
    )


def _check_positions(pos: Choice, prompts: Prompts, what: str) -> None:
    """Refuse positions that a prompt does not have, before anything is run.

    Raises:
        SteeringError: names the first such prompt.
    """
    index = read_choice(pos, what="pos", error=SteeringError)
    for place, length in enumerate(prompts.lengths):
        resolve_choice(index, length, what="pos", noun=f"tokens in {what} {place}", error=SteeringError)


def _read_strengths(given: object) -> tuple[float, ...]:
    listed = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise refusal(given, "strengths", "a list of at least one number", SteeringError)
    read = partial(read_number, expected="a finite number", error=SteeringError)
    return tuple(read(one, what=f"strengths: entry {place}") for place, one in enumerate(listed))


class _Runs:
    """Runs batches without steering, then each vector at each strength.

    Args:
        model: runs.
        vectors: by row of the table.
        steered: the edits of each vector at each strength.
        batch_size: rows at once.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        vectors: Sequence[SteeringVector],
        steered: list[list[list[Edit]]],
        *,
        batch_size: BatchSize,
    ) -> None:
        self.model, self._steered = model, steered
        self._batch_size: BatchSize = batch_size
        self._layers = [vector.layer for vector in vectors]
        self.n_cells = len(steered) * len(steered[0])

    def batches(self, prompts: Prompts, *, whole: bool = False) -> Iterator[tuple[list[int], Padded]]:
        """Prompts of similar length, as many as run at once; or all of them in their order."""
        plan = plan_batches(self.model, prompts.lengths, n_prefix=0, batch_size=self._batch_size)
        for indices in [list(range(len(prompts)))] if whole else plan:
            yield indices, prompts.take(indices).pad(self.model.device)

    def _rows(self, width: int) -> int:
        return choose_batch_size(self.model, 0, width) if self._batch_size == "auto" else self._batch_size

    def run(
        self, batch: Padded, logits_at: LogitsAt = None
    ) -> Iterator[tuple[list[int], Float[Tensor, "cells batch read d_vocab"]]]:
        """Logits of the plain run, with no cells, then those of some cells of the table at a time."""
        starts = {layer: f"blocks.{layer}.hook_resid_pre" for layer in self._layers if layer}
        # Where all start from the tokens, the logits are all there is to keep.
        kept = list(starts.values()) or ["unembed.hook_out"]
        logits, cache = self.model.run_with_cache(
            batch.ids, attention_mask=batch.mask, names_filter=kept, logits_at=logits_at
        )
        yield [], logits[None]
        n = len(batch.ids)
        for place, (layer, by_strength) in enumerate(zip(self._layers, self._steered, strict=True)):
            start = cache[starts[layer]] if layer else batch.ids
            at_once = max(1, self._rows(batch.ids.shape[1]) // n)
            for first in range(0, len(by_strength), at_once):
                edits = by_strength[first : first + at_once]
                acting = [
                    replace(edit, rows=slice(row * n, (row + 1) * n)) for row, own in enumerate(edits) for edit in own
                ]
                found = self.model.run_with_hooks(
                    start.repeat(len(edits), *[1] * (start.ndim - 1)),
                    attention_mask=batch.mask.repeat(len(edits), 1),
                    start_at_layer=layer or None,
                    edits=acting,
                    logits_at=logits_at,
                )
                cells = [place * len(by_strength) + first + row for row in range(len(edits))]
                yield cells, torch.unflatten(found, 0, (len(edits), n))


def _measure_effect(
    runs: _Runs, prompts: Prompts, metric: Metric, update: Callable[[int], object]
) -> tuple[Moments, Moments]:
    """The metric in each cell, and without steering."""
    device = runs.model.device
    moments, plain = Moments.none(runs.n_cells, device=device), Moments.none(1, device=device)
    width = max(prompts.lengths)
    for indices, batch in runs.batches(prompts, whole=metric.needs_all_pairs):
        lengths = tuple(prompts.lengths[i] for i in indices)
        metric.find_reads(lengths, batch.ids.shape[1])
        steps = runs.run(batch, metric.positions)
        _, logits = next(steps)
        seen = Runs(
            model=runs.model,
            pairs=tuple(indices),
            n_pairs=len(prompts),
            width=width,
            tokens=batch.ids,
            clean_tokens=batch.ids,
            corrupted_tokens=batch.ids,
            lengths=lengths,
            clean_logits=logits[0],
            corrupted_logits=logits[0],
        )
        prepared = prepare_metric(metric, seen)
        plain = plain.add([0], prepared.measure(logits))
        update(len(indices))
        for cells, logits in steps:
            moments = moments.add(cells, prepared.measure(logits))
            update(len(indices) * len(cells))
    return moments, plain


@dataclass(eq=False, kw_only=True)
class _Damage:
    """Sums over neutral text: divergences by cell, and losses without steering, then by cell."""

    kl: Float[Tensor, " cells"]
    loss: Float[Tensor, " places"]
    n_tokens: int = 0
    n_predicted: int = 0


def _measure_damage(runs: _Runs, prompts: Prompts, update: Callable[[int], object]) -> _Damage:
    zeros = partial(torch.zeros, dtype=torch.float64, device=runs.model.device)
    sums = _Damage(kl=zeros(runs.n_cells), loss=zeros(runs.n_cells + 1))
    for indices, batch in runs.batches(prompts):
        sums.n_tokens += int(batch.mask.sum())
        sums.n_predicted += int(batch.mask[:, 1:].sum())
        steps = runs.run(batch)
        _, logits = next(steps)
        plain = logits.double().log_softmax(-1)
        sums.loss[0] += _sum_losses(plain, batch.ids, batch.mask)[0]
        update(len(indices))
        for cells, logits in steps:
            logprobs = logits.double().log_softmax(-1)
            divergence = (plain.exp() * (plain - logprobs)).sum(-1).masked_fill(~batch.mask, 0.0)
            sums.kl[cells] += divergence.sum((1, 2))
            sums.loss[[cell + 1 for cell in cells]] += _sum_losses(logprobs, batch.ids, batch.mask)
            update(len(indices) * len(cells))
    return sums


def _sum_losses(
    logprobs: Float[Tensor, "cells batch pos d_vocab"], ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " cells"]:
    """The sum of `-log p` of every token but each text's first."""
    index = ids[None, :, 1:, None].expand(len(logprobs), -1, -1, -1)
    found = logprobs[:, :, :-1].gather(-1, index)[..., 0]
    summed: Tensor = -found.masked_fill(~mask[:, 1:], 0.0).sum((1, 2))
    return summed
