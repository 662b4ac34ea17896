"""`HookedCausalLM`: where loading, tokens, the network and generation meet.

Its methods are a few lines each that hand over to the module that does the work. They stand by concept:
`loading` (checkpoints), `checkpoints` (other forms of a model), `text` (tokens), `model` (calls and captures).
"""

from hooklens.causal_lm.calls import Input, LogitsAndLoss, ReturnType
from hooklens.causal_lm.loading import download, is_supported
from hooklens.causal_lm.model import HookedCausalLM
from hooklens.weights.late_kinds import LATE_KINDS

# What merging needs of folders and models is imported when some are merged.
LATE_KINDS.append("hooklens.causal_lm.merging")

__all__ = ["HookedCausalLM", "Input", "LogitsAndLoss", "ReturnType", "download", "is_supported"]
