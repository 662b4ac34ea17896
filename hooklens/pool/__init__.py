"""Pools of models: one YAML file, dict or list names them, and each comes out hooked.

    from hooklens import pool

    models = pool.CausalLMPool.from_yaml("pool.yaml")
    base = models.load_pretrained_model()
    for name, model in models.named_models(dtype="float32"):
        print(name, model("The capital of France is", return_type="loss"))

The keys and methods are those of FusionBench's `CausalLMPool`; `docs/pools.md` lists them, and what differs.
"""

from typing import Any

from hooklens.errors import MissingDependencyError
from hooklens.optional import import_package
from hooklens.pool.causal_lm_pool import CausalLMBackbonePool, CausalLMPool, ModelPool
from hooklens.pool.config.targets import register_target
from hooklens.pool.errors import ModelNameError, PoolError
from hooklens.pool.lazy import LazyWeights
from hooklens.pool.peft import load_peft_causal_lm

__all__ = [
    "CausalLMBackbonePool",
    "CausalLMPool",
    "LazyWeights",
    "ModelNameError",
    "ModelPool",
    "PoolError",
    "load_peft_causal_lm",
    "register_target",
]

# Imported when it is used: it needs packages of its own.
_LATE = {"load_peft_causal_lm": "hooklens.pool.peft"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        try:
            return getattr(import_package(_LATE[name]), name)
        except MissingDependencyError as error:
            raise AttributeError(f"this version of HookLens has no {__name__}.{name}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
