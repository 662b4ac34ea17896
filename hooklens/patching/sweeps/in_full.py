"""A patched run in full: one prompt, from its tokens on, where nothing is known of the edits that act in it."""

from jaxtyping import Float
from torch import Tensor

from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import HookPoint
from hooklens.hooks.call import Hook, Listening
from hooklens.patching.runs.baseline import Baseline
from hooklens.patching.runs.sites import Cell, Place
from hooklens.patching.runs.unpatched import run_one


def run_in_full(model: HookedCausalLM, baseline: Baseline, cell: Cell, pair: int) -> Float[Tensor, "read d_vocab"]:
    """The logits of one pair's run with one patch, at the positions that the metric reads.

    Args:
        model: the model.
        baseline: the unpatched runs.
        cell: the patch.
        pair: the pair, counted in the baseline.
    """
    assert baseline.edits is not None
    length = baseline.lengths[pair]
    index = _index_of(cell.name, cell.resolve(length), length)
    new = baseline.values[cell.name][pair : pair + 1][index]

    def put_in(tensor: Tensor, hook: HookPoint) -> Tensor:
        patched = tensor.clone()
        patched[index] = new
        return patched

    point = model.hook_points()[cell.name]
    patch = {point: Listening([Hook(put_in, point, form="point")])}
    standing = baseline.edits.of_one(model, pair)
    return run_one(model, baseline.into, pair, length, standing, baseline.reads[pair], last=patch)


def _index_of(name: str, at: Place, length: int) -> tuple[int | slice, ...]:
    """Where a patch stands in the activation of one prompt, which may stand among the padded ones of others."""
    site = find_site(name)
    assert site is not None
    chosen = {"pos": at.pos, "query": at.pos, "head": at.head, "kv_head": at.head, "key": at.source}
    index: list[int | slice] = []
    for axis in site.axes:
        of_tokens = axis in ("pos", "query", "key")
        number = chosen.get(axis)
        index.append(slice(length if of_tokens else None) if number is None else number)
    return tuple(index)
