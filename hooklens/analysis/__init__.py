"""Reading a model: what its activations and weights say, as labelled tables.

- `lens`: what each layer would predict, read as it is, through a tuned lens, or through a Jacobian;
- `attribution`: which components, heads and neurons a logit comes from;
- `sources`: which source tokens a head's share of a logit comes from;
- `heads`: which heads attend to the previous token, to duplicates, or as induction heads do;
- `targets`: where such a head attends;
- `circuits`: what weights read and write, in words of the vocabulary;
- `task_vectors`: what fine-tuning changed in the weights, in words of the vocabulary;
- `tokens_of_logits`: the likeliest next tokens;
- `copying`: which heads raise the logit of the token that they attend to;
- `sanity`: losses and tasks that tell whether a model works at all.

`report` asks several of these at once, and is where to begin with a prompt.

Each module opens with its method: the formula, the paper, and how to read the number. Positions count over each row's
own tokens everywhere: -1 is its last token, and padding has none.
"""

from hooklens.analysis import attribution, circuits, copying, heads, lens, sanity, sources, targets, task_vectors
from hooklens.analysis.first_report import Report, report
from hooklens.analysis.reading.connection import connect_cache
from hooklens.analysis.tokens_of_logits import logits_to_frame

__all__ = [
    "Report",
    "attribution",
    "circuits",
    "connect_cache",
    "copying",
    "heads",
    "lens",
    "logits_to_frame",
    "report",
    "sanity",
    "sources",
    "targets",
    "task_vectors",
]
