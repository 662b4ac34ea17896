"""Weight processing: equivalent networks whose weights are easier to read.

Each function takes a state dict with HookLens names and its config and gives new ones; log-probabilities
stay as they are, and so do the logits except under `center_unembed`. What each step does and when it cannot
hold is told in `folding`, `centering` and `refactoring`. The inputs are never changed. Tensors that a step
does not touch are shared with the input; touched ones are new and in the layout of `layout`. Arithmetic is
done in float32 (float64 for float64 weights), one block at a time, and rounded once to each weight's own
dtype, also when several steps touch it.

A network that was processed already may be processed again: a step that was taken finds nothing left to do and
changes weights by rounding only, but for the signs of singular vectors in `refactor_factored_attn_matrices`.
In half precision processing costs accuracy like any rounding of the weights; load in float32 where that counts.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (norms folded, circuits as
products), and the notes on weight processing of TransformerLens (Nanda 2022), whose names the steps keep.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import TransformError
from hooklens.weights.centering import CENTER_UNEMBED, CENTER_WRITING_WEIGHTS
from hooklens.weights.draft import WeightDraft
from hooklens.weights.folding import FOLD_LN, FOLD_VALUE_BIASES
from hooklens.weights.refactoring import REFACTOR_FACTORED_ATTN_MATRICES
from hooklens.weights.shapes import check_state, weight_shapes
from hooklens.weights.steps import ProcessingStep


@dataclass(frozen=True)
class Processed:
    """The outcome of weight processing.

    Attributes:
        state: the parameters, HookLens names in the order of the computation.
        cfg: the config they belong to: biases may have come into being, and a tied unembedding may be untied.
        steps: names of the steps taken, in order.
    """

    state: dict[str, Tensor]
    cfg: HookedConfig
    steps: tuple[str, ...]


def process_weights(
    state: Mapping[str, Tensor],
    cfg: HookedConfig,
    *,
    fold_ln: bool = False,
    center_writing_weights: bool = False,
    center_unembed: bool = False,
    fold_value_biases: bool = False,
    refactor_factored_attn_matrices: bool = False,
) -> Processed:
    """Take the chosen steps in the order in which they are listed here.

    Args:
        state: all parameters of the network under their HookLens names; a tied `unembed.W_U` may be absent.
        cfg: its config.
        fold_ln: see the function of that name, as for the other steps.
        center_writing_weights: LayerNorm at every entrance only.
        center_unembed: not under a soft cap on the logits.
        fold_value_biases: exact except in rows that attend nowhere.
        refactor_factored_attn_matrices: takes `fold_value_biases` with it, and records it.

    Raises:
        TransformError: lists every step that cannot hold for this config and why; raised before any work.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    wanted = {
        FOLD_LN: fold_ln,
        CENTER_WRITING_WEIGHTS: center_writing_weights,
        CENTER_UNEMBED: center_unembed,
        FOLD_VALUE_BIASES: fold_value_biases or refactor_factored_attn_matrices,
        REFACTOR_FACTORED_ATTN_MATRICES: refactor_factored_attn_matrices,
    }
    return _take_steps([step for step, chosen in wanted.items() if chosen], state, cfg)


def fold_ln(state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Move weight and bias of `ln1`, `ln2` and `ln_final` into the maps that read them.

    The norms are left with weight 1 (0 with `unit_offset`) and bias 0, where they have these. Maps that read a
    LayerNorm are centred over d_model. Biases come into being where a norm had one: `qkv_bias`, `mlp_bias` and
    `unembed_bias` are switched on, with zeros for the maps of a flag that read no such norm. A tied unembedding is
    untied, where there is
    a final norm. Norms after a branch and query-key norms stay as they are.

    Raises:
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    return _take_steps([FOLD_LN], state, cfg)


def center_writing_weights(state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Take the mean over d_model out of `W_E`, `W_pos`, `W_O`, `b_O`, `W_out`, `b_out`; untie a tied `W_U`.

    Raises:
        TransformError: something other than a LayerNorm reads the stream, or norms write to it.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    return _take_steps([CENTER_WRITING_WEIGHTS], state, cfg)


def center_unembed(state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Take the mean over the vocabulary out of `W_U` and `b_U`; untie a tied `W_U`.

    Logits move by one number per position; log-probabilities stay.

    Raises:
        TransformError: a soft cap on the logits.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    return _take_steps([CENTER_UNEMBED], state, cfg)


def fold_value_biases(state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Move `b_V` through `W_O` into `b_O` (switched on if need be) and leave zeros; nothing to do without biases.

    Exact wherever a position attends to anything: rows of the pattern sum to one.

    Raises:
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    return _take_steps([FOLD_VALUE_BIASES], state, cfg)


def refactor_factored_attn_matrices(state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Split each head's QK and OV circuit along its singular vectors, after folding the value biases.

    Raises:
        TransformError: rotary positions, query-key norm or grouped queries.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    return _take_steps([FOLD_VALUE_BIASES, REFACTOR_FACTORED_ATTN_MATRICES], state, cfg)


# Pairs of steps whose order matters; all others commute.
_ORDER_MATTERS = (
    (FOLD_LN, FOLD_VALUE_BIASES),
    (FOLD_LN, REFACTOR_FACTORED_ATTN_MATRICES),
    (CENTER_WRITING_WEIGHTS, REFACTOR_FACTORED_ATTN_MATRICES),
)


def check_transforms_match(a: Iterable[str], b: Iterable[str]) -> None:
    """Refuse to mix two things whose weights were processed differently.

    The records match if they hold the same steps and the order differs only between steps that commute: folding
    the norms brings value biases into being, so it matters whether those are folded before or after.

    Raises:
        TransformError: names both records, and the steps that only one of them has.
    """
    first, second = tuple(a), tuple(b)
    missing = sorted(set(first) ^ set(second))
    if missing:
        difference = f"only one of the two has {', '.join(missing)}"
    elif any(_restricted(first, pair) != _restricted(second, pair) for pair in _ORDER_MATTERS):
        difference = "the same steps in another order, which gives other weights"
    else:
        return
    raise TransformError(
        f"the weights were processed differently: {_describe_record(first)} against {_describe_record(second)} "
        f"({difference}); take both from models processed with the same steps"
    )


def _restricted(record: tuple[str, ...], steps: tuple[ProcessingStep, ...]) -> list[str]:
    """The record with all but some steps left out; a step repeated at once counts once."""
    names = {step.name for step in steps}
    return [name for name, _ in groupby(step for step in record if step in names)]


def _describe_record(steps: tuple[str, ...]) -> str:
    return " + ".join(steps) if steps else "no processing"


def _take_steps(steps: list[ProcessingStep], state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    _refuse_obstacles(steps, cfg)
    check_state(state, cfg)
    new_cfg = reduce(lambda config, step: step.change_config(config), steps, cfg)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()}, torch.float32)
    new_state: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer, declared in _weights_by_layer(new_cfg).items():
            draft = WeightDraft(state, declared, dtype=dtype, tied=cfg.tied_unembed)
            for step in steps:
                step.change(draft, new_cfg, "" if layer is None else f"blocks.{layer}.")
            new_state |= draft.finish()
    ordered = {name: new_state[name] for name in weight_shapes(new_cfg)}
    return Processed(ordered, new_cfg, tuple(step.name for step in steps))


def _refuse_obstacles(steps: Iterable[ProcessingStep], cfg: HookedConfig) -> None:
    refusals = [f"{step.name}: {reason}" for step in steps for reason in step.find_obstacles(cfg)]
    if refusals:
        raise TransformError(
            "this architecture does not allow the weight processing asked for; leave these steps out:\n- "
            + "\n- ".join(refusals)
        )


def _weights_by_layer(cfg: HookedConfig) -> dict[int | None, dict[str, DeclaredWeight]]:
    """The weights of each block, and under None those outside the blocks."""
    groups: dict[int | None, dict[str, DeclaredWeight]] = {}
    for name, weight in cfg.description.weights.items():
        groups.setdefault(layer_of(name), {})[name] = weight
    return groups
