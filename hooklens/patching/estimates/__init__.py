"""Attribution patching: what patches would do, to first order in the change, from a few gradients.

    effect(cell) ~ sum over entries of (activation in the other run - activation) * d metric / d activation

`attribution` estimates the cells of a sweep, `edges` the edges of the computational graph. Both cost a few runs
however many cells there are, and both are estimates: check what they find with a sweep.
"""
