"""Models whose circuit is known, to grade methods by.

`induction` sets its weights by hand; a `KnownCircuit` holds the model, the true edges, prompts and variables.
"""

from hooklens.patching.known.circuit import KnownCircuit, KnownVariable
from hooklens.patching.known.induction import induction

__all__ = ["KnownCircuit", "KnownVariable", "induction"]
