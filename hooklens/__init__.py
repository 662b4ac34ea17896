"""HookLens: look inside decoder-only language models, and change what happens there.

import hooklens as hl

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
logits, cache = model.run_with_cache("When Mary and John went to the store , John gave a drink to")
cache["pattern", 2]
"""

from hooklens.activation_cache import ActivationCache
from hooklens.axes import get_act_name
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    NormConfig,
    RotaryPositions,
    RotaryScaling,
)
from hooklens.errors import HookLensError
from hooklens.hooks import HookedModule, HookPoint, edits
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.verification import VerificationReport, verify
from hooklens.weights.factored import FactoredMatrix

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "AlibiPositions",
    "FactoredMatrix",
    "HookLensError",
    "HookPoint",
    "HookedCausalLM",
    "HookedConfig",
    "HookedKeyValueCache",
    "HookedKeyValueCacheEntry",
    "HookedModule",
    "LearnedPositions",
    "NormConfig",
    "RotaryPositions",
    "RotaryScaling",
    "VerificationReport",
    "edits",
    "get_act_name",
    "verify",
]
