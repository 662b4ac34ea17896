"""Activation patching: one activation replaced at a time, over a grid of sites.

    value(cell) = metric( model(one prompt) with activation(cell) := its value on the other prompt )

`sweep` runs a grid, `plan` decides which positions of each cell have to run, `packing` lays them side by side, and
`passes` runs them from the layer that is patched. `act_patch` has the functions of TransformerLens on top.
"""
