"""Circuits: which edges of the computational graph a behaviour needs.

`masked_run` runs prompts with every edge outside a circuit ablated, `runner` batches such runs, `faithfulness` and
`curve` measure how much of the behaviour circuits keep, which `result` holds and defines, and `acdc` searches for a
small circuit that keeps it.
"""
