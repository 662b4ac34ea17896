"""The checks of the suite by name, and the groups of stages that make each."""

from hooklens.verification.comparing.edit_values import VALUES
from hooklens.verification.comparing.options import CACHES, CHOSEN, LOSS
from hooklens.verification.comparing.options import KEPT as CACHES_KEPT
from hooklens.verification.comparing.recomputing import EXPLICIT, SHOWN
from hooklens.verification.comparing.single_edits import CONSISTENT, SINGLE
from hooklens.verification.conformance.declarations import ANEW, DECLARED, GROUP, TAKES_PART
from hooklens.verification.editing import CHANGES_LOGITS, EQUAL_COPY, IN_PLACE, REACHES, SPARES, STAYS
from hooklens.verification.gradients import ALONE, GRADIENT
from hooklens.verification.reference import LOGITS
from hooklens.verification.round_trip import FILES, WEIGHTS
from hooklens.verification.subject import FIRING, ROUND_TRIP
from hooklens.verification.watching import AXES, EQUAL_IN_PLACE, FIRES, KEPT, SAME_TENSOR, WATCHING

GROUPS_OF: dict[str, tuple[str, ...]] = {
    LOGITS: (LOGITS,),
    FILES: (ROUND_TRIP,),
    WEIGHTS: (ROUND_TRIP,),
    DECLARED: (GROUP,),
    TAKES_PART: (GROUP,),
    ANEW: (GROUP,),
    FIRES: (FIRING,),
    AXES: (FIRING,),
    SHOWN: ("shown tensors",),
    EXPLICIT: ("explicit logits",),
    SINGLE: ("single edits",),
    CONSISTENT: ("single edits",),
    CHOSEN: ("positions and layers",),
    LOSS: ("loss",),
    CACHES: ("caches",),
    CACHES_KEPT: ("caches",),
    VALUES: ("edits as values",),
    WATCHING: ("shown tensors", "watching"),
    KEPT: ("watching",),
    SAME_TENSOR: ("hook points",),
    EQUAL_IN_PLACE: ("hook points",),
    EQUAL_COPY: ("hook points",),
    CHANGES_LOGITS: ("hook points",),
    REACHES: ("hook points",),
    SPARES: ("hook points",),
    STAYS: ("hook points",),
    IN_PLACE: ("hook points",),
    GRADIENT: ("gradients",),
    ALONE: ("gradients",),
}
"""Where the results of each check come from."""

CHECKS = tuple(GROUPS_OF)
"""The names of all checks, as reports and test ids give them."""
