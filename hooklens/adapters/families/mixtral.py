"""Mixtral (Jiang et al. 2024, "Mixtral of Experts").

Checkpoints: mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1 and their instruct versions, and fine-tunes of them
(Nous-Hermes-2, dolphin-2.x-mixtral), whose `model_type` is `mixtral`.

Peculiarities:
- Mistral's network with a mixture of experts in every layer; the gates of the chosen experts always sum to one.
- `intermediate_size` is the width of an expert, of which `w1` is the gate, `w3` the linear half and `w2` the way out.
- One sliding window for all layers where there is one; none where the config is silent (Mistral: 4096).
- The rotary base is a million where the config is silent.
- `router_jitter_noise` acts in training only.
- transformers 5 holds experts stacked and calls `block_sparse_moe` `mlp` in memory, and writes the names below.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    Key,
    MixtureKeys,
    PositionKeys,
    WindowKeys,
    norm_key,
)
from hooklens.adapters.tables import expert_rules, llama_rules, router_rules, stacked_expert_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=131072, default_base=1e6),
        WindowKeys(typed=False),
        MixtureKeys(
            options=(
                Key("num_local_experts", "n_experts", int, alias="num_experts"),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
            ),
            fixed={"gate_norm": 1.0},
        ),
    ),
    fixed={"gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    # Of merged checkpoints, whose configs were Llama's.
    pinned={"attention_bias": False, "mlp_bias": False},
    inert=(*INERT_ROUTER_KEYS, "router_jitter_noise"),
)

_LAYER = "model.layers.{i}"
_MIXTURE = f"{_LAYER}.block_sparse_moe"

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM", "MixtralModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        mlp=(
            *router_rules(f"{_MIXTURE}.gate"),
            *expert_rules(f"{_MIXTURE}.experts.{{e}}", gate="w1", up="w3", down="w2"),
        )
    ),
    in_memory=(*router_rules(f"{_LAYER}.mlp.gate"), *stacked_expert_rules(f"{_LAYER}.mlp.experts")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
