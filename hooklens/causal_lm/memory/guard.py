"""The refusal of a capture that the free memory cannot hold, before anything of it runs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.causal_lm.calls import Input, PreparedCall
from hooklens.causal_lm.memory.free import free_bytes
from hooklens.errors import InputError, InsufficientMemoryError
from hooklens.model.decoder import Decoder
from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.causal_lm.memory.plan import MemoryPlan

# Imported where a call is planned: it knows the model.
_PLAN = "hooklens.causal_lm.memory.plan"

# What is surely below needs no look at the free memory.
_SMALL = 2**28


def refuse_beyond_memory(
    model: Decoder,
    input: Input,
    call: PreparedCall,
    n_points: int,
    keywords: dict[str, Any],
) -> None:
    """Refuse a call of `run_with_cache` that takes more than the memory that is free.

    A call is planned only where a bound on what it keeps comes near the free memory; a bound for the parts of
    HookLens, since parts of one's own may have wider points.

    Args:
        model: the model.
        input: as it was given.
        call: the same, prepared.
        n_points: how many points are captured.
        keywords: those of `run_with_cache`.

    Raises:
        InsufficientMemoryError: the call would take more.
    """
    bound = _bound(model, call, n_points) * (2 if keywords.get("incl_bwd") else 1)
    if bound <= _SMALL or torch.compiler.is_compiling() or type(call.input) is not Tensor:
        return
    free = free_bytes(call.input.device)
    if free is None or 2 * bound <= free:
        return
    planned = {name: value for name, value in keywords.items() if name not in ("fwd_hooks", "bwd_hooks")}
    try:
        plan: MemoryPlan = import_package(_PLAN).plan(model, input, **planned)
    except InputError:
        # What cannot be known before the call is no reason to refuse it.
        return
    if not plan.fits:
        raise InsufficientMemoryError(describe(plan))


def _bound(model: Decoder, call: PreparedCall, n_points: int) -> int:
    """Bytes that a capture of so many points takes at most."""
    cfg = model.cfg
    n_tokens = call.plan.batch * call.plan.n_new
    widest = max(cfg.n_heads * max(cfg.d_head, cfg.d_model, call.plan.n_keys), cfg.mlp_width)
    return n_tokens * (n_points * widest + 4 * cfg.d_vocab_out) * model.dtype.itemsize


def describe(plan: "MemoryPlan") -> str:
    """The refusal of a call that does not fit: its numbers, and what to do."""
    short = "; ".join(
        f"{_tell(peak)} on {device}, where {_tell(plan.free[device])} are free"
        for device, peak in plan.peaks.items()
        if peak > plan.free.get(device, peak)
    )
    remedies = ", or ".join(f"{one.change} (spares about {_tell(one.saves)})" for one in plan.suggestions[:4])
    return (
        f"run_with_cache would take {short}: {_tell(plan.captured)} of {len(plan.sites)} activations, "
        f"{_tell(plan.output)} of output and what the forward holds besides. Expected a call that fits; "
        f"{f'take {remedies}; ' if remedies else ''}hooklens.plan(model, input, ...) tells more, and "
        "check_memory=False runs the call as it is"
    )


def _tell(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
