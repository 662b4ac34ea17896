"""`ActivationCache`: what a run captured, a mapping from hook name to tensor, and the stream taken apart.

A cache knows the config, the transforms and the tokens of the run, and shares (never copies) the weights of
the model, but holds no model. It is immutable: every method that changes something gives a new cache, whose
tensors are views of the old ones wherever a view can say it.
"""

from hooklens.activation_cache.cache import ActivationCache
from hooklens.activation_cache.captured import Key
from hooklens.activation_cache.missing import MissingActivationError

__all__ = ["ActivationCache", "Key", "MissingActivationError"]
