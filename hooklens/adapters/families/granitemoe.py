"""Granite 3 with a mixture of experts (Shen et al. 2024, "Power Scheduler"; Granite Team 2024, "Granite 3.0").

Checkpoints: ibm-granite/granite-3.0-1b-a400m-base, granite-3.0-3b-a800m-base, the same of 3.1, their instruct
versions, and ibm/PowerMoE-3b, whose `model_type` is `granitemoe`. With a shared expert (`granitemoeshared`) or with
Mamba (`granitemoehybrid`) it is another architecture.

Peculiarities:
- Granite's four factors: on the embedding (`embedding_multiplier`), on what each branch adds to the stream
  (`residual_multiplier`), on scores (`attention_multiplier`, in place of the inverse root of the head size), and under
  the logits (`logits_scaling` divides).
- `intermediate_size` is the width of an expert. The gates are the softmax over the chosen experts' logits.
- Experts are stacked, the gate's rows before the linear half's; transformers 5 gives these tensors other names in
  memory.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    MULTIPLIER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    MixtureKeys,
    PositionKeys,
    norm_key,
)
from hooklens.adapters.tables import llama_rules, router_rules, stacked_expert_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        *MULTIPLIER_KEYS,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(),
        MixtureKeys(
            options=(
                Key("num_local_experts", "n_experts", int),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
            ),
            fixed={"gate_norm": 1.0},
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    inert=INERT_ROUTER_KEYS,
)

_MIXTURE = "model.layers.{i}.block_sparse_moe"

FAMILY = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    architectures=("GraniteMoeForCausalLM", "GraniteMoeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        mlp=(
            *router_rules(f"{_MIXTURE}.router.layer"),
            *stacked_expert_rules(_MIXTURE, gate_up="input_linear.weight", down="output_linear.weight"),
        )
    ),
    in_memory=(*router_rules(f"{_MIXTURE}.router"), *stacked_expert_rules(f"{_MIXTURE}.experts")),
)
