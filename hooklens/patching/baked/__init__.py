"""Ablations written into weights, so that a circuit is a checkpoint: `bake`."""
