"""Pairs of prompts: a clean one, and a corrupted one that differs from it in what is to be located.

- `template` makes pairs from text and names their positions.
- `answers`: the tokens that metrics read, given as ids or texts, for all pairs or for each.
- `prompts` reads what experiments are given, checks that both sides of each pair align token by token, and pads them
  on the right, so that columns are positions.
- `loader` reads pairs that come one after another.
"""
