"""OLMoE (Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models").

Checkpoints: allenai/OLMoE-1B-7B-0924, OLMoE-1B-7B-0125, their SFT, DPO and Instruct versions.

Peculiarities:
- Queries and keys are normed over all heads at once, with a weight for every entry; then, where the config has
  `clip_qkv`, held between its value and minus that, as values are.
- `intermediate_size` is the width of an expert. The gates of the chosen experts are the softmax over all experts as it
  is, unless `norm_topk_prob` says otherwise.
- A key-value head for every query head where the config is silent.
- transformers 5 holds experts stacked in memory.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    MixtureKeys,
    PositionKeys,
    norm_key,
    norm_topk_key,
)
from hooklens.adapters.tables import (
    attention_rules,
    expert_rules,
    llama_rules,
    qk_norm_rules,
    router_rules,
    stacked_expert_rules,
)

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("clip_qkv", "clip_qkv", float, default=None),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=4096),
        MixtureKeys(
            options=(
                Key("num_experts", "n_experts", int, alias="num_local_experts"),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
                norm_topk_key(),
            )
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "qk_norm_over": "all_heads"},
    inert=INERT_ROUTER_KEYS,
)

_ATTENTION, _MLP = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"

FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
    architectures=("OlmoeForCausalLM", "OlmoeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=(*attention_rules(_ATTENTION), *qk_norm_rules(_ATTENTION, heads_flat=True)),
        mlp=(*router_rules(f"{_MLP}.gate"), *expert_rules(f"{_MLP}.experts.{{e}}")),
    ),
    in_memory=stacked_expert_rules(f"{_MLP}.experts"),
)
