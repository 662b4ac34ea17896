"""The memory plan of a sweep: the sweep itself, gone through without values."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import reads, require
from hooklens.axes import is_below_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.plan import MemoryPlan
from hooklens.causal_lm.memory.replay import Replay, count_storages
from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.errors import SweepInterruptedError
from hooklens.patching.metrics.group import Metrics
from hooklens.patching.pairs.loader import Pairs
from hooklens.patching.pairs.prompts import Corrupted, PromptPairs
from hooklens.patching.runs.baseline import Baseline, Direction
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.sites import Sites
from hooklens.patching.runs.unpatched import Source
from hooklens.patching.sweeps.run import SweepRun
from hooklens.patching.sweeps.sweep import begin_sweep

# Which entries of patterns differ is a flag for each; so many tokens have values.
_N_TOKENS = 2**24

_BEFORE_ATTENTION = tuple(
    f"blocks.0.{part}"
    for part in (
        *("hook_resid_pre", "hook_attn_in", "hook_q_", "hook_k_", "hook_v_", "ln1."),
        *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_"),
    )
)
_BESIDE_ATTENTION = ("blocks.0.hook_mlp_", "blocks.0.ln2.", "blocks.0.mlp.")


class _SweepWithoutValues(SweepRun):
    """A sweep in which nobody knows where two runs differ but from their tokens."""

    def _run_baseline(self, prompts: PromptPairs, chosen: list[int]) -> Baseline:
        baseline = super()._run_baseline(prompts, chosen)
        width = max(baseline.lengths)
        tokens = prompts.differ(chosen, width).to(self.model.device)
        # What a token changes reaches all positions behind it, in a causal network.
        reached = tokens.cumsum(1) > 0
        if self.source != "other" or not (baseline.is_causal and self.model.cfg.causal):
            reached = tokens = torch.ones_like(tokens)
        known = {
            name: _spread(tokens if _sees_own_token_only(name, self.model.cfg) else reached, tensor.shape)
            for name, tensor in baseline.differs.items()
        }
        return replace(baseline, differs=known)


def _sees_own_token_only(name: str, cfg: HookedConfig) -> bool:
    """Whether a hook point stands before the first attention, so that no other position reaches it."""
    if not name.startswith("blocks."):
        return is_below_blocks(name)
    return name.startswith(_BEFORE_ATTENTION) or (cfg.wiring == "parallel" and name.startswith(_BESIDE_ATTENTION))


def _spread(by_position: Tensor, shape: torch.Size) -> Tensor:
    """Flags `[pairs pos]` at the shape of an activation `[pairs pos ...]`."""
    return by_position.view(*by_position.shape, *(1 for _ in shape[2:])).expand(shape)


@reads(model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"))
def plan_sweep(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    sites: Sites | None = None,
    metric: Metrics | None = None,
    *,
    batch_size: BatchSize = "auto",
    direction: Direction = "denoise",
    source: Source = "other",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    allow_training: bool = False,
) -> MemoryPlan:
    """What a sweep would take of memory, without running it: `forward` and `peak` are the most it holds at once.

    The sweep is gone through on a copy of the model whose tensors have no values, with all its passes; see
    `hooklens.plan`. Where runs differ is taken from their tokens: a patch at a position behind the first token that
    differs is taken to change something.

    Args:
        model, clean, corrupted, sites, metric, direction, source, attention_mask, edits, allow_training: as of `sweep`.
        batch_size: as of `sweep`; `"auto"` is settled by the memory that is free now.

    Raises:
        InputError: what `sweep` refuses, or a sweep that depends on values, as a function that is a metric may.
        HookNameError, SiteError, EditError, TransformError: as of `sweep`.

    Example:
        >>> patching.plan_sweep(model, clean, corrupted, "z", patching.LogitDiff(" Mary", " John")).peak
    """
    refuse_missing("plan_sweep", sites=sites, metric=metric)
    replay = Replay(_N_TOKENS, unknown=0)
    shared = [model.tokenizer, model.cfg, *(one for one in (clean, corrupted) if isinstance(one, Tensor))]
    copied, other, acting = replay.copy((model, source, edits), shared=shared)
    try:
        with replay.running(grad=False):
            options = RunOptions.read(
                copied,
                batch_size=batch_size,
                direction=direction,
                progress=False,
                allow_training=allow_training,
                edits=acting,
            )
            prompts = (clean, corrupted, attention_mask)
            run = begin_sweep(_SweepWithoutValues, copied, prompts, sites, metric, options, other)
            run.finish()
    except SweepInterruptedError as stopped:
        raise InputError(
            f"plan_sweep: the memory of this sweep is not known before it runs: without values {stopped.__cause__}. A "
            "metric or an edit that is a function may look at values; plan with patching.LogitDiff, say"
        ) from stopped
    return MemoryPlan.of_peaks(
        dict(replay.peak),
        weights=count_storages([*model.parameters(), *model.buffers()]),
        output=sum(count_storages([tally.per_pair()]) for tally in run.tallies),
        notes=(f"{run.forwards} passes",),
    )
