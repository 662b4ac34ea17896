"""Interchanges at the positions of one layer, measured by a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.alignment.basis import Basis
from hooklens.alignment.causal.counterfactuals import Counterfactuals
from hooklens.alignment.runs import InterchangeRuns
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.edits import exchange
from hooklens.patching.metrics.metric import Cells, Values
from hooklens.patching.metrics.of_answers import OfAnswers
from hooklens.patching.runs.memory import BatchSize, pairs_per_group
from hooklens.patching.runs.sites import grid
from hooklens.patching.sweeps.sweep import sweep
from hooklens.precision import widen


@dataclass(frozen=True, eq=False)
class Margin(OfAnswers):
    """By how much the answer's logit leads the best other one: above 0 where the model gives the answer."""

    def measure(self, logits: Cells) -> Values:
        """The answer's logit minus the largest of the others."""
        own = self.read(logits, "answer")[..., 0]
        ids = self._ids("answer").ids[:, 0].to(logits.device)
        wide = widen(logits)
        index = ids[None, :, None, None].expand(len(wide), wide.shape[1], wide.shape[2], 1)
        return self.average(own - wide.scatter(-1, index, -torch.inf).amax(-1))


def measure_cells(
    model: HookedCausalLM,
    data: Counterfactuals,
    name: str,
    bases: Mapping[int, Mapping[str, Basis]],
    *,
    whole: bool,
    batch_size: BatchSize,
) -> tuple[Float[Tensor, "pos row"], Float[Tensor, " row"]]:
    """The margins under the interchange at each of some positions, and without any.

    Args:
        model: the model.
        data: the rows.
        name: the hook point.
        bases: by position, the bases of variables, orthogonal to each other.
        whole: interchange whole vectors, of the only variable.
        batch_size: rows that run at once.
    """
    positions = list(bases)
    width = data.base.shape[1]
    # What is put in and what it is made of are held beside the sweep's own runs.
    size = max(1, pairs_per_group(model, width, [name] * (2 + len(data.variables)), 1))
    found, unpatched = [], []
    for first in range(0, len(data), size):
        part = data.take(range(first, min(first + size, len(data))))
        base, sources = InterchangeRuns(model, part, name, batch_size=batch_size).vectors()
        new = base.clone()
        for position in positions:
            for variable, source in sources.items():
                there = source[:, position]
                new[:, position] = there if whole else exchange(new[:, position], there, bases[position][variable].rows)
        result = sweep(
            model,
            next(iter(part.sources.values())),
            part.base,
            grid(name, positions=positions),
            Margin(part.labels[:, None], pos=part.pos),
            source={name: new},
            attention_mask=torch.ones_like(part.base),
            batch_size=batch_size,
            progress=False,
        )
        found.append(result.per_pair.reshape(len(positions), -1))
        unpatched.append(result.corrupted_per_pair)
    return torch.cat(found, 1), torch.cat(unpatched)
