"""The computational graph that edges and paths run through.

`nodes` lists who writes to the residual stream (embeddings, heads, MLPs) and who reads from it (queries, keys and
values of heads, MLPs, logits), and which reader comes after which writer. A `Circuit` is a set of edges between them.
"""
