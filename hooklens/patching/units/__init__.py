"""Units: circuits finer than nodes, of single entries of activations: neurons, or latents of a spliced autoencoder.

`circuit` says which entries a circuit holds, `ground` runs prompts with all others ablated, `scores` estimates what
each does, and `evaluate` measures circuits.
"""
