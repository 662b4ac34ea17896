"""Alignment search: where a model keeps the variables of a causal model.

- `CausalModel`: an algorithm as plain functions of named variables; `Counterfactuals`: prompts to take variables from,
  and the answers that it then gives.
- `Basis`: directions at a hook point, from probes, differences of means, principal components or training.
- `train_das`: trains them, for one or several variables at once; `search`: does it, or takes fixed ones, for every
  layer and position, beside controls.
"""

from hooklens.alignment.basis import Basis
from hooklens.alignment.causal.counterfactuals import Counterfactuals
from hooklens.alignment.causal.model import CausalModel
from hooklens.alignment.das.result import DasResult
from hooklens.alignment.das.train import DasOptions, train_das
from hooklens.alignment.errors import AlignmentError, AlignmentInterruptedError
from hooklens.alignment.site import Site
from hooklens.alignment.tables.search import search
from hooklens.alignment.tables.table import AlignmentTable

__all__ = [
    "AlignmentError",
    "AlignmentInterruptedError",
    "AlignmentTable",
    "Basis",
    "CausalModel",
    "Counterfactuals",
    "DasOptions",
    "DasResult",
    "Site",
    "search",
    "train_das",
]
