"""Gradients of a metric at hook points, in runs that lie between those of two prompts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.axes import EMBEDDINGS, is_past_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.hooks.call import NOBODY, Listeners, ListeningBlock, join_listeners
from hooklens.patching.estimates.rules import GRADIENT, ReadRules, RuleHook, split_at_head
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.acting import Places
from hooklens.patching.runs.baseline import Baseline, Direction, take_sides
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.noised import add_noise
from hooklens.patching.runs.unpatched import Side
from hooklens.patching.runs.vocabulary import unembed

Rule = Literal["right", "left", "midpoint"]

# A pass over more tokens is no faster per token on a CPU, and its graph would only take memory.
_TOKENS_ON_CPU = 1024
_SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True)
class Move:
    """Where a gradient is taken: the run that is patched, with one activation moved towards the other run's.

    No gradient goes through the activation, wherever it is moved to.

    Attributes:
        name: the hook point of the activation.
        fraction: how far it is moved, 0 to 1.
    """

    name: str = "hook_embed"
    fraction: float = 0.0


def fractions_of(rule: Rule, steps: int, *, direction: Direction) -> list[float]:
    """How far from the run that is patched the points of a rule lie, for `steps` points between the two runs.

    Counted from the corrupted run to the clean one, `"right"` takes the points `k / steps` for `k = 1 .. steps`,
    `"left"` those for `k = 0 .. steps - 1`, and `"midpoint"` `(k - 1/2) / steps` for `k = 1 .. steps`.
    """
    shift = {"right": 1.0, "left": 0.0, "midpoint": 0.5}[rule]
    towards_clean = [(k + shift) / steps for k in range(steps)]
    return towards_clean if direction == "denoise" else [1.0 - fraction for fraction in towards_clean]


class GradientRuns:
    """Runs of some pairs with gradients, one for each move.

    Args:
        model: the model.
        prompts: all pairs of the experiment.
        baseline: the unpatched runs of the pairs that are run.
        direction: which run is patched.
        rules: how backward passes depart from the gradient.

    Attributes:
        forwards: runs of the network so far, those with a backward pass included.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        baseline: Baseline,
        *,
        direction: Direction,
        rules: ReadRules = GRADIENT,
    ) -> None:
        pairs, width = list(baseline.pairs), max(baseline.lengths)
        self.model, self.baseline, self.rules = model, baseline, rules
        self._into, self._other = take_sides(model, prompts, pairs, width, direction)
        self._differ = prompts.differ(pairs, width)
        self.forwards = 0

    @property
    def into(self) -> Int[Tensor, "pairs pos"]:
        """The prompts of the run that is patched."""
        return self._into.tokens

    @property
    def mask(self) -> Bool[Tensor, "pairs pos"]:
        """Real tokens."""
        columns = torch.arange(self.into.shape[1], device=self.into.device)
        return columns < torch.tensor(self.baseline.lengths, device=self.into.device)[:, None]

    @property
    def may_differ(self) -> Bool[Tensor, "pairs pos"]:
        """Real tokens at and behind the first one in which the prompts of a pair differ.

        Before it the activations of both are the same, up to how rows of one batch are rounded.
        """
        return (self._differ.cumsum(1) > 0) & self.mask if self.baseline.is_causal else self.mask

    def unmoved(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Activations of the run that is patched, without a graph."""
        with torch.no_grad(), self._standing(self._into, in_head=True), self.model.capture(list(names)) as captured:
            self._run(self._into)
        return captured

    def run(
        self,
        moves: Sequence[Move],
        graded: Sequence[str],
        kept: Sequence[str] = (),
        *,
        drops: Sequence[RuleHook] = (),
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The activations of each run, and the metric's gradient at them.

        Args:
            moves: the runs.
            graded: the hook points where gradients are taken.
            kept: the hook points whose activations are given back; they are detached.
            drops: what acts besides the rules.

        Yields:
            Activations and gradients by hook name. A hook point that the metric does not depend on has no gradient.

        Raises:
            InputError: the metric has no gradient.
        """
        targets = self._targets(moves)
        watched = list(dict.fromkeys(kept))
        # A function of one's own may read all positions.
        in_head = any(map(is_past_blocks, graded)) or not self.baseline.is_planned
        leaves = {name for name in EMBEDDINGS if name in self.model.hook_points()}
        for move in moves:
            one = _GradientRun(move, targets.get(move.name))
            hooks = [(name, one.leave_graph) for name in leaves | {move.name}]
            below, behind = split_at_head([*self.rules.hooks(self.model), *drops])
            with (
                torch.enable_grad(),
                self._standing(self._into, in_head=in_head),
                self.model.hooks([*hooks, *below], [(list(graded), one.keep_gradient)]),
                self.model.capture(watched or "hook_embed") as now,
            ):
                value = self._measure(behind, all_columns=in_head).sum()
                if not value.requires_grad:
                    raise InputError(
                        f"metric {self.baseline.metric.name} has no gradient: attribution needs a differentiable one"
                    )
                torch.autograd.grad(value, one.leaves, allow_unused=True)
            yield {name: now[name].detach() for name in watched}, one.gradients

    def _measure(self, in_head: Sequence[RuleHook], *, all_columns: bool) -> Tensor:
        """The metric's values; logits are made where it reads them, or everywhere for gradients behind the blocks."""
        reads = self.baseline.reads[..., None]
        if all_columns:
            with self.model.hooks(in_head):
                logits = self._run(self._into, unembed=True).take_along_dim(reads, dim=1)
        else:
            stream = self._run(self._into).take_along_dim(reads, dim=1)
            with self.model.hooks(in_head):
                logits = unembed(self.model, stream, listeners=self._edits_at_reads())
        return self.baseline.metric.measure(logits[None])[0]

    def _targets(self, moves: Sequence[Move]) -> dict[str, Tensor]:
        """The other run's activations at the places that are moved."""
        places = list(dict.fromkeys(move.name for move in moves if move.fraction))
        if not places:
            return {}
        stop = 0 if places == ["hook_embed"] else None
        with torch.no_grad(), self._standing(self._other, in_head=False), self.model.capture(places) as captured:
            self._run(self._other, stop_at_layer=stop)
        return captured

    def _standing(self, side: Side, *, in_head: bool) -> AbstractContextManager[None]:
        """A block in which noise and the experiment's edits act, before what is attached in it.

        Args:
            side: the run.
            in_head: edits past the blocks act, too.
        """
        acting, edits = add_noise(self.model, side.noise), self.baseline.edits
        if edits is not None:
            names = [name for name in edits.acting if in_head or not is_past_blocks(name)]
            of_edits = edits.listeners(self.model, edits.places(*side.tokens.shape), names)
            acting = join_listeners([acting, of_edits])
        return ListeningBlock(lambda: acting, None) if acting else nullcontext()

    def _edits_at_reads(self) -> Listeners:
        """What they do behind the blocks, where only the positions that the metric reads are run."""
        edits, reads = self.baseline.edits, self.baseline.reads
        if edits is None:
            return NOBODY
        places = Places(torch.arange(len(reads), device=reads.device), reads)
        return edits.listeners(self.model, places, edits.names_in_head)

    def _run(self, side: Side, *, unembed: bool = False, stop_at_layer: int | None = None) -> Tensor:
        self.forwards += stop_at_layer is None
        plan = self.model.make_plan(side.tokens, self.mask)
        return self.model.run(side.tokens, plan, unembed=unembed, stop_at_layer=stop_at_layer)


class _GradientRun:
    """What becomes a leaf of one run's graph, and the gradients that arrive at hook points."""

    def __init__(self, move: Move, target: Tensor | None) -> None:
        self.move, self.target = move, target
        self.leaves: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def leave_graph(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        """The activation as a leaf, moved where this is the place to move."""
        value = tensor.detach()
        if self.target is not None and hook.name == self.move.name and self.move.fraction:
            value = torch.lerp(value, self.target, self.move.fraction)
        leaf = value.clone().requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def keep_gradient(self, gradient: Tensor, hook: HookPoint) -> None:
        """Keep what arrives at a hook point."""
        assert hook.name is not None
        self.gradients[hook.name] = gradient.detach()


def pairs_per_graph(
    model: HookedCausalLM,
    prompts: PromptPairs,
    metric: Metric,
    *,
    batch_size: BatchSize,
    held: int,
    is_planned: bool = True,
) -> int | None:
    """How many pairs are run at once; None: all, since the metric cannot be measured for some alone.

    Args:
        model: the model.
        prompts: all pairs.
        metric: what is measured.
        batch_size: pairs at once; `"auto"` by memory.
        held: numbers held for each token, beside the graph.
        is_planned: prompts may stand beside each other; if not, they run one by one.

    Raises:
        InputError: prompts that run one by one, and a metric that sees all of them at once.
    """
    if not is_planned:
        if metric.needs_all_pairs and len(prompts) > 1:
            raise InputError(
                f"metric {metric.name} sees all pairs at once, and under edits that are functions (Custom) each "
                "runs by itself; give a metric such as patching.LogitDiff, or patching.sweep, which takes both"
            )
        return 1
    if metric.needs_all_pairs:
        return None
    if batch_size != "auto":
        return batch_size
    width = max(prompts.lengths)
    n_reads = width if metric.positions is None else len(metric.positions)
    # Logits, their softmax and its gradient.
    per_pair = width * (graph_size(model, width) + held) + 4 * n_reads * model.cfg.d_vocab
    size = int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(model.device)) // (per_pair * model.dtype.itemsize)
    return max(1, min(size, _TOKENS_ON_CPU // width) if model.device.type == "cpu" else size)


def graph_size(model: HookedCausalLM, width: int) -> int:
    """An upper bound for the numbers that a graph of the whole network keeps for each token.

    Args:
        model: the model.
        width: columns of a row.
    """
    cfg = model.cfg
    of_heads = (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
    # The stream and its norms, all that attention reads and writes before and after rotary, and the MLP.
    of_block = 10 * cfg.d_model + 4 * of_heads + (6 if cfg.gated_mlp else 4) * cfg.mlp_width
    # Scores, their cap, the mask and the pattern, where no kernel keeps them to itself.
    of_pattern = 4 * cfg.n_heads * width
    return cfg.n_layers * (of_block + of_pattern)
