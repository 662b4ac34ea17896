"""Pools of models: one YAML file, dict or list names them, and each comes out hooked.

    from hooklens import pool

    models = pool.CausalLMPool.from_yaml("pool.yaml")
    base = models.load_pretrained_model()
    for name, model in models.named_models(dtype="float32"):
        print(name, model("The capital of France is", return_type="loss"))

The keys and methods are those of FusionBench's `CausalLMPool`; `docs/pools.md` lists them, and what differs.
"""

from hooklens.pool.backbone import CausalLMBackbonePool
from hooklens.pool.causal_lm_pool import CausalLMPool, ModelPool
from hooklens.pool.comparing.compare import compare_models
from hooklens.pool.comparing.result import ModelComparison
from hooklens.pool.config.targets import register_target
from hooklens.pool.errors import ModelNameError, PoolError
from hooklens.pool.lazy import LazyWeights
from hooklens.pool.peft import load_peft_causal_lm

__all__ = [
    "CausalLMBackbonePool",
    "CausalLMPool",
    "LazyWeights",
    "ModelComparison",
    "ModelNameError",
    "ModelPool",
    "PoolError",
    "compare_models",
    "load_peft_causal_lm",
    "register_target",
]
