"""What of a sweep has to run: the positions that a cell's patch can change and the metric can see."""

from collections.abc import Sequence

import numpy as np

from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.runs.baseline import Baseline
from hooklens.patching.runs.sites import Cell, Place
from hooklens.patching.sweeps.packing import Segment


def plan_segments(model: HookedCausalLM, cells: Sequence[Cell], baseline: Baseline) -> list[Segment]:
    """What has to run for each cell and pair: from the first position that changes to the last that is read."""
    reads_all = baseline.metrics.n_positions is None
    last_read = [
        length if reads_all else int(reads.max()) + 1
        for length, reads in zip(baseline.lengths, baseline.reads.cpu(), strict=True)
    ]
    differs = {name: tensor.cpu().numpy() for name, tensor in baseline.differs.items()}
    whole = not can_share(model, baseline)
    has_keys = {name: "key" in axes_of(name) for name in differs}
    segments = []
    for index, cell in enumerate(cells):
        layer = baseline.entries[cell.name].layer
        places = {length: cell.resolve(length) for length in set(baseline.lengths)}
        for pair, length in enumerate(baseline.lengths):
            at = places[length]
            start = _first_change(differs[cell.name][pair, :length], at)
            stop = length if whole or has_keys[cell.name] else last_read[pair]
            if start is not None and (start < last_read[pair] or not baseline.is_causal):
                segments.append(Segment(index, pair, 0 if whole else start, stop, layer, at))
    return segments


def _first_change(differs: np.ndarray, at: Place) -> int | None:
    """The first position at which a patch changes something; None where it changes nothing."""
    if at.source is not None:
        differs = differs[..., at.source]
    if at.head is not None:
        differs = differs[:, at.head]
    if at.pos is not None:
        return at.pos if bool(differs[at.pos].any()) else None
    changed = differs.reshape(len(differs), -1).any(1)
    return int(changed.argmax()) if bool(changed.any()) else None


def can_share(model: HookedCausalLM, baseline: Baseline) -> bool:
    """Whether some columns can run without the others.

    They cannot where rotary frequencies depend on the length, or edits make columns depend on each other.
    """
    return not model.depends_on_length(max(baseline.lengths)) and not baseline.needs_whole_rows


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of the tensor at a hook point."""
    site = find_site(name)
    assert site is not None
    return site.axes
