"""Evaluation on a shared prefix: the log-probability of many continuations, and multiple choice.

The log-probability of a continuation `t_1 ... t_n` after a prefix is `sum_i log p(t_i | prefix, t_1 ... t_(i-1))`,
in nats. The prefix runs once; its keys and values serve every continuation. Numbers equal those of each full
sequence run alone.
"""

from hooklens.evaluation.continuations import score_continuations
from hooklens.evaluation.items import ContinuationItem, ItemError, MultipleChoiceItem, read_items
from hooklens.evaluation.multiple_choice import multiple_choice
from hooklens.evaluation.stream import StreamSummary, score_file

__all__ = [
    "ContinuationItem",
    "ItemError",
    "MultipleChoiceItem",
    "StreamSummary",
    "multiple_choice",
    "read_items",
    "score_continuations",
    "score_file",
]
