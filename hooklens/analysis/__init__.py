"""Reading a model: what its activations and weights say, as labelled tables.

- `lens`: what each layer would predict;
- `attribution`: which components, heads and neurons a logit comes from;
- `heads`: which heads attend to the previous token, to duplicates, or as induction heads do;
- `circuits`: what weights read and write, in words of the vocabulary;
- `sanity`: losses and tasks that tell whether a model works at all.

Each module opens with its method: the formula, the paper, and how to read the number.
"""

from hooklens.analysis import attribution, circuits, heads, lens, sanity
from hooklens.analysis.connection import connect_cache

__all__ = ["attribution", "circuits", "connect_cache", "heads", "lens", "sanity"]
