"""Steering: directions that change what a model does, how much, at what cost, and in its weights.

- `fit`: steering vectors from contrastive prompts, at any hook points in one pass.
- `select_direction`: the one direction of many that a behaviour hangs on, chosen on held-out prompts.
- `fit_erasure`: the affine map that hides a concept from every linear probe.
- `sweep_strength`: the effect of each vector at each strength, beside the damage that it does.
- `bake`: a model that steers by itself.
"""

from hooklens.steering.baking import bake
from hooklens.steering.candidates import ablate_everywhere
from hooklens.steering.erasing import fit_erasure
from hooklens.steering.erasure import Erasure, PointErasure
from hooklens.steering.errors import SteeringError
from hooklens.steering.fitting import fit
from hooklens.steering.provenance import Provenance
from hooklens.steering.selected import Criteria, DirectionSelection
from hooklens.steering.selection import select_direction
from hooklens.steering.strengths import sweep_strength
from hooklens.steering.table import SteeringTable, StrengthChoice
from hooklens.steering.vectors import SteeringVector, SteeringVectors

__all__ = [
    "Criteria",
    "DirectionSelection",
    "Erasure",
    "PointErasure",
    "Provenance",
    "SteeringError",
    "SteeringTable",
    "SteeringVector",
    "SteeringVectors",
    "StrengthChoice",
    "ablate_everywhere",
    "bake",
    "fit",
    "fit_erasure",
    "select_direction",
    "sweep_strength",
]
