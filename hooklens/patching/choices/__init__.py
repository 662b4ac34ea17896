"""Choices: which edges make up a circuit, given a score for each.

`ScoredEdges` holds the scores, an `EdgeChoice` makes circuits of them: the strongest edges, greedily from the logits,
pruned to paths, or the best of all connected circuits (`programme`). `stable` chooses what pairs of prompts agree on,
`chance` draws circuits that no score has chosen, and `recovery` grades scores by a circuit that is known.
"""
