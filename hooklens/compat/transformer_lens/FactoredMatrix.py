"""`FactoredMatrix` of 2.x, which is HookLens's."""

from hooklens.weights.factored import FactoredMatrix

__all__ = ["FactoredMatrix"]
