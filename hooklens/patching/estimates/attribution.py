"""Attribution patching: what every patch would do, estimated from one gradient.

Activation patching to first order (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"):
with `a` an activation of the run that is patched, `a'` its new value and `m` the metric,

    value(cell) = m + sum over the cell of (a' - a) * dm/da

so two forwards and one backward give an estimate for all cells at once (`method="atp"`). It is exact where the
rest of the network is linear in the patch, and fails where the gradient is flat, as in a saturated softmax.

`method="ig"` averages the gradient over runs whose input embeddings lie between those of the two prompts, at
fractions `(k - 1/2) / steps` of the way (integrated gradients, Sundararajan et al. 2017; Hanna et al. 2024, "Have
Faith in Faithfulness"), which sees past flat places at `steps` times the cost.

Pairs are run in groups, so memory does not grow with their number.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_one_of
from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import join_names
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.estimates.gradients import GradientRuns, Move, fractions_of, pairs_per_graph
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Prompt, PromptPairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.sites import Cell, CellArray, Sites, lay_out
from hooklens.patching.runs.tally import Tally
from hooklens.precision import wide_dtype

Method = Literal["atp", "ig"]


@torch.inference_mode(mode=False)
def attribution(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Prompt | None = None,
    sites: Sites | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    method: Method = "atp",
    steps: int = 8,
    direction: Direction = "denoise",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult:
    """Estimate what `patching.sweep` would give, from gradients.

    Args:
        model: the model; its parameters' gradients are neither needed nor changed.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths.
        sites: as for a sweep.
        metric: as for a sweep; it must be differentiable.
        method: `"atp"`: the gradient of the run that is patched; `"ig"`: averaged on the way to the other run.
        steps: gradients averaged by `"ig"`.
        direction: which run is patched.
        batch_size: pairs run at once; `"auto"` by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: prompts that do not go together, an unknown method, or a metric without a gradient.
        MetricError: the metric is NaN or infinite for an unpatched run.
        SweepInterruptedError: it was stopped on the way; it holds what was estimated.
    """
    refuse_missing("attribution", sites=sites, metric=metric)
    assert sites is not None
    assert metric is not None
    options = RunOptions.read(
        model, batch_size=batch_size, direction=direction, progress=progress, allow_training=allow_training
    )
    moves = _list_moves(method, steps)
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    array, measured = lay_out(sites, model, prompts.lengths), as_metric(metric).encode(model)
    _refuse_discrete(array)
    run = _AttributionRun(model, prompts, array, measured, moves, options.direction)
    return run.finish(batch_size=options.batch_size, progress=options.progress)


def _refuse_discrete(array: CellArray) -> None:
    """Refuse sites whose numbers name something.

    Raises:
        SiteError: names them.
    """
    names = dict.fromkeys(cell.name for cell in array.cells)
    discrete = [name for name in names if (site := find_site(name)) is not None and site.discrete]
    if discrete:
        raise SiteError(
            f"attribution: there is nothing between two values of {join_names(discrete)}, so no gradient tells what a "
            "patch does; use patching.sweep"
        )


def _list_moves(method: Method, steps: int) -> list[Move]:
    """Where gradients are taken.

    Raises:
        InputError: an unknown method, or no steps.
    """
    read_one_of(method, what="attribution: method", options=("atp", "ig"))
    read_int(steps, what="attribution: steps", least=1)
    # Midpoints are the same counted from either end.
    return (
        [Move()] if method == "atp" else [Move(fraction=f) for f in fractions_of("midpoint", steps, direction="noise")]
    )


class _AttributionRun:
    """The values of all cells, filled in group by group."""

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        array: CellArray,
        metric: Metric,
        moves: Sequence[Move],
        direction: Direction,
    ) -> None:
        self.model, self.prompts, self.array, self.metric = model, prompts, array, metric
        self.moves, self.direction = moves, direction
        self.names = list(dict.fromkeys(cell.name for cell in array.cells))
        self.tally = Tally(len(array.cells), len(prompts), dtype=wide_dtype(model.dtype), device=model.device)
        self.forwards, self.n_tokens = 0, 0

    def finish(self, *, batch_size: BatchSize, progress: bool) -> SweepResult:
        """Estimate all cells of all pairs."""

        def work() -> None:
            held, tqdm = self._numbers_held(), import_package("tqdm").tqdm
            size = pairs_per_graph(self.model, self.prompts, self.metric, batch_size=batch_size, held=held)
            with tqdm(total=self.tally.n_values, desc="estimating", disable=not progress) as bar:
                for group in self.prompts.split(size):
                    self._run_group(group)
                    bar.update(self.tally.n_cells * len(group))

        return self.tally.finish("attribution", work, self.result)

    def result(self) -> SweepResult:
        """The values so far."""
        n_cells, n_pairs = self.tally.n_cells, self.tally.n_pairs
        clean, corrupted = self.tally.ends()
        return SweepResult(
            per_pair=self.tally.per_pair().view(*(len(labels) for labels in self.array.axes.values()), -1),
            axes=self.array.axes,
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            cells=tuple(cell.describe() for cell in self.array.cells),
            metric=self.metric.name,
            direction=self.direction,
            stats=SweepStats(
                cells=n_cells,
                pairs=n_pairs,
                unchanged=0,
                forwards=self.forwards,
                tokens=self.n_tokens,
                naive_forwards=(n_cells + 2) * n_pairs,
                naive_tokens=(n_cells + 2) * sum(self.prompts.lengths),
            ),
        )

    def _run_group(self, group: list[int]) -> None:
        with torch.no_grad():
            baseline = run_baseline(
                self.model,
                self.prompts,
                group,
                self.names,
                self.metric,
                direction=self.direction,
                source="other",
            )
        runs = GradientRuns(self.model, self.prompts, baseline, direction=self.direction)
        moved = self.moves[0].fraction > 0
        current = runs.unmoved(self.names) if moved else {}
        slopes: dict[str, Tensor] = {}
        for now, gradients in runs.run(self.moves, self.names, () if moved else self.names):
            current = current or now
            for name, gradient in gradients.items():
                part = gradient / len(self.moves)
                slopes[name] = slopes[name] + part if name in slopes else part
        # A hook point that the metric does not depend on has gradient 0.
        effects = {
            name: effect_of(name, change_of(baseline, name, old), slopes.get(name, torch.zeros_like(old)))
            for name, old in current.items()
        }
        base = baseline.corrupted if self.direction == "denoise" else baseline.clean
        values = torch.stack([_sum_cell(effects[cell.name], cell, baseline.lengths) for cell in self.array.cells])
        self.tally.begin(baseline.clean, baseline.corrupted, baseline.lengths)
        self.tally.store(slice(None), values + base)
        # Both unpatched prompts are one batch.
        self.forwards += 1 + runs.forwards
        self.n_tokens += (2 + runs.forwards) * sum(baseline.lengths)

    def _numbers_held(self) -> int:
        """For each token: both runs' values and gradients of what is patched, and the baseline's streams and keys."""
        cfg, width = self.model.cfg, max(self.prompts.lengths)
        widest = max(cfg.d_model, cfg.n_heads * cfg.d_head, cfg.mlp_width, cfg.n_heads * width)
        per_head = cfg.n_heads * cfg.d_model
        of_names = sum(per_head if _is_per_head(name) else widest for name in self.names)
        return 6 * of_names + cfg.n_layers * (2 * cfg.d_model + 4 * cfg.n_kv_heads * cfg.d_head)


def _is_per_head(name: str) -> bool:
    """Whether a hook point carries a vector of the stream's width for each head."""
    site = find_site(name)
    assert site is not None
    return "d_model" in site.axes and bool({"head", "kv_head"} & set(site.axes))


def change_of(baseline: Baseline, name: str, current: Tensor) -> Tensor:
    """New value minus old at a hook point; 0 where both are the same infinity."""
    entry = baseline.entries[name]
    old = baseline.streams[entry.layer] if entry.stage == "stream" else current
    new = baseline.values[name]
    return torch.where(new == old, torch.zeros_like(new), new - old)


def effect_of(name: str, change: Tensor, gradient: Tensor) -> Float[Tensor, "pairs pos *rest"]:
    """The first-order effect of each entry of an activation; vectors are summed."""
    site = find_site(name)
    assert site is not None
    effect = change * gradient
    return effect.transpose(1, 2) if "key" in site.axes else effect.sum(-1)


def _sum_cell(effect: Tensor, cell: Cell, lengths: Sequence[int]) -> Tensor:
    """The effect of one cell for each pair."""
    sums = []
    for row, length in zip(effect, lengths, strict=True):
        at, part = cell.resolve(length), row[:length]
        if at.source is not None:
            part = part[..., at.source]
        if at.head is not None:
            part = part[:, at.head]
        sums.append((part if at.pos is None else part[at.pos]).sum())
    return torch.stack(sums)
