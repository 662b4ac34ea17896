"""Ablation: what a head, an MLP or the embeddings write in place of their own output.

- `"resample"`: what they write on the paired corrupted prompt (Chan et al. 2022, "Causal Scrubbing"). The network
  stays on inputs that it knows, and what both prompts share stays.
- `"mean"`: the mean of what they write on the corrupted prompts of all pairs, position by position (Wang et al.
  2022); positions have to mean the same in all prompts, so these must have the same length.
- `"zero"`: nothing, which can throw a network far off what it knows.
- a mapping from hook name to tensor, that broadcasts to `[pairs pos ...]`: means over a data set of one's own, such
  as `mean_activations(model, prompts, ["resid_pre", "result", "mlp_out"])` gives. Heads stand together at
  `blocks.{layer}.attn.hook_result`, MLPs at `blocks.{layer}.hook_mlp_out`, the embeddings at
  `blocks.0.hook_resid_pre`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.nodes import list_writers
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.acting import act_on_pairs
from hooklens.patching.runs.baseline import take_sides
from hooklens.patching.runs.edits import RunEdits
from hooklens.patching.runs.sources import fit_given
from hooklens.patching.runs.unpatched import run_unpatched
from hooklens.precision import widen

Ablation = Literal["resample", "mean", "zero"] | Mapping[str, Tensor]


def check_ablation(model: HookedCausalLM, prompts: PromptPairs, ablation: Ablation) -> None:
    """Refuse what cannot be an ablation of these prompts.

    Raises:
        InputError: an unknown word, or means over prompts of different length.
        SiteError: a mapping that lacks hook points; all of them are named.
    """
    if isinstance(ablation, str):
        if ablation not in ("resample", "mean", "zero"):
            raise InputError(
                f"ablation is {ablation!r}; expected 'resample', 'mean', 'zero', or a mapping from hook name to tensor"
            )
        if ablation == "mean" and prompts.is_padded:
            raise InputError(
                f"ablation='mean' averages position by position over all prompts, and these have between "
                f"{min(prompts.lengths)} and {max(prompts.lengths)} tokens, so a position does not mean the same in "
                "all of them; use prompts of one length, 'resample', or pass means of your own by hook name"
            )
        return
    missing = [name for name in written_names(model) if name not in ablation]
    if missing:
        raise SiteError(
            f"the ablation has no outputs for {join_names(missing)}; it needs those of the embeddings, and of all "
            "heads and MLPs of every layer"
        )


def written_names(model: HookedCausalLM) -> list[str]:
    """The hook points where writers write."""
    return list(dict.fromkeys(writer.hook_name for writer in list_writers(model.cfg)))


@torch.no_grad()
def average_edited(
    model: HookedCausalLM, prompts: PromptPairs, names: Sequence[str], edits: RunEdits, *, batch_size: int
) -> dict[str, Tensor]:
    """The mean over the corrupted prompts, under edits, of what passes some hook points, `[1 pos ...]`.

    Args:
        model: the model.
        prompts: pairs of one length.
        names: the hook points.
        edits: what acts in the runs.
        batch_size: prompts run at once.
    """
    sums: dict[str, Tensor] = {}
    for group in prompts.split(batch_size):
        acting = act_on_pairs(model, prompts, group, edits)
        side, _ = take_sides(model, prompts, group, max(prompts.lengths), "denoise")
        captured, _ = run_unpatched(model, side, None, list(names), acting)
        for name in names:
            total = widen(captured[name]).sum(0, keepdim=True)
            sums[name] = total + sums[name] if name in sums else total
    return {name: (total / len(prompts)).to(model.dtype) for name, total in sums.items()}


def ablated_outputs(
    ablation: Literal["zero"] | Mapping[str, Tensor],
    *,
    like: Mapping[str, Tensor],
    pairs: Sequence[int],
    prompts: PromptPairs,
) -> Mapping[str, Tensor]:
    """The ablated outputs of some pairs, by hook name, where they are not those of a run.

    Args:
        ablation: `"zero"`, or outputs by hook name.
        like: the outputs of the clean run.
        pairs: which pairs of the experiment these are.
        prompts: all pairs.

    Raises:
        SiteError: an output of another shape.
    """
    if isinstance(ablation, str):
        return {name: torch.zeros_like(output) for name, output in like.items()}
    size = {"n_pairs": len(prompts), "width": max(prompts.lengths)}
    return {name: fit_given(name, ablation[name], output, pairs, **size) for name, output in like.items()}
