"""Learned circuits: gates on edges and nodes, trained by gradients, and constants to ablate to that cost least.

`gates` has the hard concrete distribution, `level` says what has a gate, `soft_run` runs prompts with gates in place of
a circuit, `training` trains them, `learn` is the experiment and `result` what it gives.
"""
