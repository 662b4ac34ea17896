"""Models whose circuit is known, to grade methods by.

`induction` sets its weights by hand; `train_small_algorithm` trains a transformer to answer by a circuit that is given,
and `train` does so for any. A `KnownCircuit` holds the model, the true edges, prompts and variables; `check` measures
how well it holds.
"""

from hooklens.patching.known.check import KnownCheck, check
from hooklens.patching.known.circuit import KnownCircuit, KnownVariable
from hooklens.patching.known.clamp import train_small_algorithm
from hooklens.patching.known.induction import induction
from hooklens.patching.known.training import train

__all__ = ["KnownCheck", "KnownCircuit", "KnownVariable", "check", "induction", "train", "train_small_algorithm"]
