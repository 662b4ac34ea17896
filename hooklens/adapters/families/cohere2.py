"""Cohere's Command R7B and Command A (Cohere 2025, "Command A: An Enterprise-Ready Large Language Model").

Checkpoints: CohereLabs/c4ai-command-r7b-12-2024, c4ai-command-a-03-2025, tiny-aya-*.

Peculiarities:
- Command R's network without norms of queries and keys.
- Three layers slide, the fourth sees all, where there are no `layer_types` (`sliding_window_pattern`). Only layers that
  slide are rotated; the others know no positions.
- `use_parallel_block`, `use_gated_activation`, `position_embedding_type`, `rotary_pct` and `use_qk_norm` are notes of
  Cohere's own code that transformers does not read.
"""

from collections.abc import Sequence

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    ConfigReader,
    Key,
    LayeredRotary,
    PositionKeys,
    WindowKeys,
    all_but_every,
    norm_key,
)
from hooklens.adapters.keys.windows import FULL
from hooklens.adapters.tables import llama_rules

_PERIOD = "sliding_window_pattern"


def _sees_all(reader: ConfigReader, kinds: Sequence[str], window: int | None) -> list[bool]:
    return [window is None or kind == FULL for kind in kinds]


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5, bias=False, wide_weight=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("logit_scale", "logits_scale", float, default=0.0625),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        LayeredRotary(
            windows=WindowKeys(default=4096, slides=all_but_every(4, _PERIOD), slides_keys=(_PERIOD,), nullable=False),
            rotary=PositionKeys(default_n_ctx=8192, layout="interleaved"),
            unrotated=_sees_all,
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "wiring": "parallel", "shared_norm": True},
    pinned={
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    },
    inert=(
        "cache_implementation",
        "layer_switch",
        "model_max_length",
        "order_of_interleaved_layers",
        "use_embedding_sharing",
        "use_parallel_embedding",
    ),
)

FAMILY = Family(
    name="cohere2",
    model_types=("cohere2",),
    architectures=("Cohere2ForCausalLM", "Cohere2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
