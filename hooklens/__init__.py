"""HookLens: look inside decoder-only language models, and change what happens there.

import hooklens as hl

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
logits, cache = model.run_with_cache("When Mary and John went to the store , John gave a drink to")
cache["pattern", 2]
"""

from typing import TYPE_CHECKING, Any

from hooklens import documents
from hooklens.activation_cache import ActivationCache
from hooklens.axes import get_act_name
from hooklens.causal_lm import HookedCausalLM, download, is_supported
from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    MLAConfig,
    MoEConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    QueryTemperature,
    RotaryPositions,
    RotaryScaling,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.errors import HookLensError
from hooklens.hooks import HookedModule, HookPoint, edits
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.optional import import_package
from hooklens.progress import progress_bars
from hooklens.weights.factored import FactoredMatrix

if TYPE_CHECKING:
    from hooklens import (
        alignment,
        analysis,
        datasets,
        evaluation,
        parallel,
        patching,
        pool,
        sae,
        steering,
        training,
        verification,
        viz,
    )
    from hooklens.causal_lm.memory.plan import MemoryPlan, plan
    from hooklens.verification import VerificationReport, verify

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
    "MLAConfig",
    "MemoryPlan",
    "MoEConfig",
    "NoPositions",
    "NormConfig",
    "PartConfig",
    "QueryTemperature",
    "RotaryPositions",
    "RotaryScaling",
    "ShortformerPositions",
    "SinusoidalPositions",
    "VerificationReport",
    "alignment",
    "analysis",
    "datasets",
    "documents",
    "download",
    "edits",
    "evaluation",
    "get_act_name",
    "is_supported",
    "parallel",
    "patching",
    "plan",
    "pool",
    "progress_bars",
    "sae",
    "steering",
    "training",
    "verification",
    "verify",
    "viz",
]

# Packages of experiments, imported when first used: `hl.patching.sweep(...)`.
_LATE = frozenset(
    {
        "alignment",
        "analysis",
        "datasets",
        "evaluation",
        "parallel",
        "patching",
        "pool",
        "sae",
        "steering",
        "training",
        "verification",
        "viz",
    }
)
# What stands here of modules that are imported when first used.
_LATE_NAMES = {
    "MemoryPlan": "causal_lm.memory.plan",
    "VerificationReport": "verification",
    "plan": "causal_lm.memory.plan",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return import_package(f"{__name__}.{name}")
    if name in _LATE_NAMES:
        return getattr(import_package(f"{__name__}.{_LATE_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
