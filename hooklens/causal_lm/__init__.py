"""`HookedCausalLM`: where loading, tokens, the network and generation meet.

Its methods are a few lines each that hand over to the module that does the work. They stand by concept:
`checkpoints` (where a model comes from and goes to), `text` (tokens), `model` (calls and captures).
"""

from hooklens.causal_lm.calls import Input, LogitsAndLoss, ReturnType
from hooklens.causal_lm.model import HookedCausalLM

__all__ = ["HookedCausalLM", "Input", "LogitsAndLoss", "ReturnType"]
