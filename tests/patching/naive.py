"""The reference for sweeps: one full forward per cell, with a hook of a few lines."""

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.axes import find_site
from hooklens.patching import Metric


def cell_index(cell: dict, name: str) -> tuple:
    axes = find_site(name).axes
    index: list = [slice(None)] * len(axes)
    for word, names in (("pos", ("pos", "query")), ("head", ("head", "kv_head")), ("source", ("key",))):
        axis = next((axes.index(axis) for axis in names if axis in axes), None)
        if cell[word] is not None and axis is not None:
            index[axis] = cell[word]
    return tuple(index)


@torch.no_grad()
def patch_naively(
    model: HookedCausalLM, from_tokens: Tensor, into_tokens: Tensor, cell: dict, metric: Metric, *, source="other"
) -> Tensor:
    """The metric `[batch]` of `into` with one cell's activation of `from`, all rows unpadded and run in full."""
    name = cell["site"]
    index = cell_index(cell, name)
    _, cache = model.run_with_cache(from_tokens, names_filter=name)

    def replace(tensor, hook):
        patched = tensor.clone()
        patched[index] = 0.0 if source == "zero" else cache[name][index]
        return patched

    return metric(model.run_with_hooks(into_tokens, fwd_hooks=[(name, replace)]))
