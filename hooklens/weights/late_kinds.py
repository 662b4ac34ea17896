"""Which modules know more kinds of models that are merged than `hooklens.weights.merging` does itself.

A module of a higher row names itself here when its package is imported, and is imported when a model is merged that is
no mapping of tensors: what is not merged costs nothing.
"""

LATE_KINDS: list[str] = []
"""Names of modules that register with `hooklens.weights.merging.kinds.open_operand`."""
