"""Generation: prompts and their continuations, token by token.

`HookedCausalLM.generate` and `generate_stream` are in `TextGeneration`. Nothing here knows a network: a model
is whatever can plan a call and run it (`GeneratingModel`).
"""

from hooklens.generation.choosing.drawing import sample_logits
from hooklens.generation.methods import TextGeneration
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions
from hooklens.generation.output import Alternative, GenerationOutput, GenerationStep, GenerationTiming

__all__ = [
    "Alternative",
    "GeneratingModel",
    "GenerationOptions",
    "GenerationOutput",
    "GenerationStep",
    "GenerationTiming",
    "TextGeneration",
    "sample_logits",
]
