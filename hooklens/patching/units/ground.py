"""Runs of the clean prompts with units ablated: entries of activations take other values, all at once.

What stays is what the network makes of what came before in this very run, so a unit that stays feels those below it
that do not. Rows are whole runs of the model, one for each circuit and pair; with a splice its units are those of its
own points, such as the latents of an autoencoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.hooks import HookPoint
from hooklens.hooks.edits import Add
from hooklens.hooks.splice import Splice
from hooklens.patching.errors import MetricError, SiteError
from hooklens.patching.estimates.rules import GRADIENT, ReadRules, RuleHook
from hooklens.patching.metrics.metric import Metric, Runs, prepare_metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.sources import fit_given

UnitAblation = Literal["resample", "mean", "zero"] | Mapping[str, Tensor]
Masks = Mapping[str, Bool[Tensor, "circuit unit"]]
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class UnitGround:
    """Some pairs' unpatched runs.

    Attributes:
        pairs: which pairs these are.
        lengths: tokens of each.
        tokens: ids of the clean prompts.
        metric: the metric, prepared for them.
        clean, corrupted: its values in the unpatched runs.
        reads: the positions that the metric reads.
        own: by hook name, the activation of the clean run.
        ablated: by hook name, what takes its place.
    """

    pairs: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Int[Tensor, "pair pos"]
    metric: Metric
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    reads: Int[Tensor, "pair read"]
    own: Mapping[str, Tensor]
    ablated: Mapping[str, Tensor]


class UnitRunner:
    """Runs prompts with units ablated.

    Args:
        model: the model.
        prompts: the pairs.
        names: the hook points of the units.
        metric: what is measured, encoded.
        splices: autoencoders and the like, which act in every run.
        ablation: what is put in the place of a unit's own value.
        batch_size: rows run at once, circuits times pairs; `"auto"`: some thousand tokens.

    Attributes:
        forwards, tokens: what has been run.

    Raises:
        HookNameError, SiteError, InputError: hook points that are not there or have no entries, or another ablation.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        names: Sequence[str],
        metric: Metric,
        *,
        splices: Sequence[Splice],
        ablation: UnitAblation,
        batch_size: BatchSize,
    ) -> None:
        self.model, self.prompts, self.metric = model, prompts, metric
        self.batch_size: BatchSize = batch_size
        self.names, self.splices = list(names), list(splices)
        self.forwards, self.tokens = 0, 0.0
        self.ablation_name = ablation if isinstance(ablation, str) else "given"
        _check_ablation(ablation, self.names, prompts)
        self.ablation = self._mean() if isinstance(ablation, str) and ablation == "mean" else ablation

    def groups(self) -> Iterator[list[int]]:
        """The pairs that are run together."""
        per_group = max(1, _TOKENS_AT_ONCE // max(self.prompts.lengths))
        size = per_group if self.batch_size == "auto" else self.batch_size
        return self.prompts.split(None if self.metric.needs_all_pairs else size)

    def circuits_per_pass(self, ground: UnitGround) -> int:
        """How many circuits to run at once."""
        rows = max(1, _TOKENS_AT_ONCE // ground.tokens.shape[1]) if self.batch_size == "auto" else self.batch_size
        return max(1, rows // len(ground.pairs))

    def prepare(self, pairs: list[int]) -> UnitGround:
        """Run both prompts of some pairs.

        Raises:
            MetricError: the metric is NaN or infinite for one of them.
            SiteError: a given ablation of another shape.
        """
        prompts = self.prompts
        lengths = tuple(prompts.lengths[pair] for pair in pairs)
        width = max(lengths)
        clean, corrupted = prompts.clean[pairs, :width], prompts.corrupted[pairs, :width]
        logits, own = self._capture(clean, lengths)
        noise = prompts.draw_noise(pairs, width, self.model.dtype)
        other_logits, other = self._capture(corrupted, lengths, noise)
        reads = torch.tensor(self.metric.find_reads(lengths, width), device=logits.device)
        runs = Runs(
            model=self.model,
            pairs=tuple(prompts.first + pair for pair in pairs),
            n_pairs=prompts.n_pairs,
            width=max(prompts.lengths),
            tokens=clean,
            clean_tokens=clean,
            corrupted_tokens=corrupted,
            lengths=lengths,
            clean_logits=_read(logits, reads),
            corrupted_logits=_read(other_logits, reads),
            answers=None if prompts.answers is None else prompts.answers.take(pairs),
            wrongs=None if prompts.wrongs is None else prompts.wrongs.take(pairs),
        )
        ends = torch.stack(list(self.metric.measure_ends(runs)))
        if not ends.isfinite().all():
            broken = [pairs[place] for place in (~ends.isfinite()).any(0).nonzero()[:, 0].tolist()]
            raise MetricError(
                f"metric {self.metric.name} is NaN or infinite for the unpatched runs of pairs {broken}; nothing could "
                "be compared"
            )
        return UnitGround(
            pairs=tuple(pairs),
            lengths=lengths,
            tokens=clean,
            metric=prepare_metric(self.metric, runs),
            clean=ends[0],
            corrupted=ends[1],
            reads=reads,
            own=own,
            ablated={name: self._ablate(name, own[name], other[name], pairs) for name in self.names},
        )

    def measure(self, ground: UnitGround, masks: Masks) -> Float[Tensor, "circuit pair"]:
        """The metric of the clean prompts with all units outside each circuit ablated."""
        n_circuits = len(next(iter(masks.values())))
        n_pairs = len(ground.pairs)

        def ablate(tensor: Tensor, hook: HookPoint) -> Tensor:
            name = str(hook.name)
            kept = masks[name].to(tensor.device)[:, None, None, :]
            apart = tensor.view(n_circuits, n_pairs, *tensor.shape[1:])
            return torch.where(kept, apart, ground.ablated[name]).view(tensor.shape)

        logits = self._run(ground.tokens.repeat(n_circuits, 1), ground.lengths * n_circuits, ablate)
        read = _read(logits, ground.reads.repeat(n_circuits, 1))
        return ground.metric.measure(read.view(n_circuits, n_pairs, *read.shape[1:]))

    def gradients(
        self, ground: UnitGround, rules: ReadRules = GRADIENT, drops: Sequence[RuleHook] = ()
    ) -> dict[str, Tensor]:
        """The gradient of the metric's sum over pairs with respect to each activation of the clean run.

        Args:
            ground: the pairs.
            rules: how the backward pass departs from the gradient.
            drops: what acts besides them.

        Raises:
            MetricError: the metric has no gradient.
        """
        held: dict[str, Tensor] = {}

        def hold(tensor: Tensor, hook: HookPoint) -> Tensor:
            # A tensor of its own, so that also what is shown beside the computation is on the way to the metric.
            held[str(hook.name)] = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
            return held[str(hook.name)]

        # What is held stands behind the rules of its own point: their slopes are of what leads to it.
        with torch.enable_grad(), self.model.hooks([*rules.hooks(self.model), *drops]):
            logits = self._run(ground.tokens, ground.lengths, hold)
            value = ground.metric.measure(_read(logits, ground.reads)[None]).sum()
            if not value.requires_grad:
                raise MetricError(f"metric {self.metric.name} has no gradient; score units with method='exact'")
            found = torch.autograd.grad(value, [held[name] for name in self.names], allow_unused=True)
        return {
            name: torch.zeros_like(held[name]) if gradient is None else gradient
            for name, gradient in zip(self.names, found, strict=True)
        }

    def _mask(self, lengths: Sequence[int]) -> Int[Tensor, "row pos"] | None:
        if len(set(lengths)) == 1:
            return None
        columns = torch.arange(max(lengths), device=self.model.device)
        return (columns < torch.tensor(lengths, device=columns.device)[:, None]).long()

    def _run(self, tokens: Tensor, lengths: Sequence[int], hook: Any) -> Tensor:
        self._count(tokens)
        found: Tensor = self.model.run_with_hooks(
            tokens,
            fwd_hooks=[(name, hook) for name in self.names],
            splices=self.splices,
            attention_mask=self._mask(lengths),
        )
        return found

    def _capture(
        self, tokens: Tensor, lengths: Sequence[int], noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._count(tokens)
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(
                tokens,
                names_filter=self.names,
                edits=[] if noise is None else [Add("hook_embed", noise)],
                splices=self.splices,
                attention_mask=self._mask(lengths),
            )
        found = {name: cache[name] for name in self.names}
        wrong = [f"{name} {list(tensor.shape)}" for name, tensor in found.items() if tensor.ndim != 3]
        if wrong:
            raise SiteError(
                f"units are entries of activations [batch pos unit], and these are others: {join_names(wrong)}; take "
                "mlp.hook_post, a stream, or the latents of a splice. Heads are nodes of a Circuit"
            )
        return logits, found

    def _count(self, tokens: Tensor) -> None:
        self.forwards += 1
        self.tokens += tokens.numel()

    def _ablate(self, name: str, own: Tensor, other: Tensor, pairs: list[int]) -> Tensor:
        if isinstance(self.ablation, str):
            return other if self.ablation == "resample" else torch.zeros_like(own)
        size = {"n_pairs": len(self.prompts), "width": max(self.prompts.lengths)}
        return fit_given(name, self.ablation[name], own, pairs, **size)

    def _mean(self) -> dict[str, Tensor]:
        """The means over the corrupted prompts of all pairs, position by position."""
        sums: dict[str, Tensor] = {}
        for pairs in self.groups():
            lengths = [self.prompts.lengths[pair] for pair in pairs]
            width = max(lengths)
            noise = self.prompts.draw_noise(pairs, width, self.model.dtype)
            _, found = self._capture(self.prompts.corrupted[pairs, :width], lengths, noise)
            for name, tensor in found.items():
                part = tensor.sum(0, keepdim=True, dtype=torch.float64)
                sums[name] = sums[name] + part if name in sums else part
        return {name: (total / len(self.prompts)).to(self.model.dtype) for name, total in sums.items()}


def _read(
    logits: Float[Tensor, "row pos d_vocab"], reads: Int[Tensor, "row read"]
) -> Float[Tensor, "row read d_vocab"]:
    return logits.take_along_dim(reads[..., None], dim=1)


def _check_ablation(ablation: object, names: Sequence[str], prompts: PromptPairs) -> None:
    """Refuse what cannot be put in the place of units.

    Raises:
        InputError: an unknown word, or means over prompts of different length.
        SiteError: a mapping without some of the hook points.
    """
    if isinstance(ablation, str):
        if ablation not in ("resample", "mean", "zero"):
            raise InputError(
                f"ablation is {ablation!r}; expected 'resample', 'mean', 'zero', or a mapping from hook name to tensor"
            )
        if ablation == "mean" and prompts.is_padded:
            raise InputError(
                f"ablation='mean' averages position by position, and the prompts have between {min(prompts.lengths)} "
                f"and {max(prompts.lengths)} tokens; use prompts of one length, 'resample', or tensors by hook name"
            )
        return
    require(ablation, kind=Mapping, what="ablation", expected="'resample', 'mean', 'zero', or tensors by hook name")
    assert isinstance(ablation, Mapping)
    missing = [name for name in names if name not in ablation]
    if missing:
        raise SiteError(f"the ablation has no values for {join_names(missing)}; it has {show(list(ablation))}")
