"""Weight processing: equivalent networks whose weights are easier to read.

Each step takes a state dict with HookLens names and its config and gives new ones; log-probabilities
stay as they are, and so do the logits except under `center_unembed`. What each does and when it cannot
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
from itertools import groupby

from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.errors import TransformError
from hooklens.weights import centering, folding, refactoring
from hooklens.weights.steps import Processed, take_steps


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
        fold_ln: see the step of that name, as for the others.
        center_writing_weights: LayerNorm at every entrance only.
        center_unembed: not under a soft cap on the logits.
        fold_value_biases: exact except in rows that attend nowhere.
        refactor_factored_attn_matrices: takes `fold_value_biases` with it, and records it.

    Raises:
        TransformError: lists every step that cannot hold for this config and why; raised before any work.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    wanted = {
        folding.fold_ln: fold_ln,
        centering.center_writing_weights: center_writing_weights,
        centering.center_unembed: center_unembed,
        folding.fold_value_biases: fold_value_biases,
        refactoring.refactor_factored_attn_matrices: refactor_factored_attn_matrices,
    }
    return take_steps([step for step, chosen in wanted.items() if chosen], state, cfg)


# Pairs of steps whose order matters; all others commute.
_ORDER_MATTERS = (
    ("fold_ln", "fold_value_biases"),
    ("fold_ln", "refactor_factored_attn_matrices"),
    ("center_writing_weights", "refactor_factored_attn_matrices"),
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


def _restricted(record: tuple[str, ...], steps: tuple[str, str]) -> list[str]:
    """The record with all but some steps left out; a step repeated at once counts once."""
    return [name for name, _ in groupby(step for step in record if step in steps)]


def _describe_record(steps: tuple[str, ...]) -> str:
    return " + ".join(steps) if steps else "no processing"
