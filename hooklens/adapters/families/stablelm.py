"""StableLM (Tow et al. 2023, "StableLM 3B 4E1T"; Bellagente et al. 2024, "Stable LM 2 1.6B Technical Report").

Checkpoints: stabilityai/stablelm-3b-4e1t, stablelm-zephyr-3b, stable-code-3b, stablelm-2-1_6b, stablelm-2-12b.

Peculiarities:
- Llama's gated MLP and names around LayerNorms with bias; `use_qkv_bias` (2-1.6B) gives queries, keys and values
  biases, and no other map ever has one.
- Rotary turns the first quarter of each head where the config is silent.
- `use_parallel_residual` (2-12B): attention and MLP read the same stream through one norm; there is no second on disk.
- `qk_layernorm` (2-12B): a LayerNorm without bias over each head's query and key, with weights for each head, each in
  a tensor of its own.
- There are 32 key-value heads where the config is silent, whatever the number of heads.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    Derived,
    Key,
    PositionKeys,
    norm_key,
    qk_norm_flag,
)
from hooklens.adapters.rules import Copy
from hooklens.adapters.tables import BLOCK, Rules, attention_rules, llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5),
        qk_norm_flag(bias=False, per_head=True),
        Key(
            "use_parallel_residual",
            "wiring",
            bool,
            default=False,
            decode=lambda parallel: "parallel" if parallel else "sequential",
            encode=lambda wiring: wiring == "parallel",
        ),
        Derived(lambda fields: {"shared_norm": fields["wiring"] == "parallel"}),
        Key("use_qkv_bias", "qkv_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=4096, fraction="partial_rotary_factor", default_fraction=0.25),
    ),
    fixed={"gated_mlp": True, "out_bias": False, "mlp_bias": False},
)

_ATTENTION = "model.layers.{i}.self_attn"

# A tensor for each head.
_QK_NORMS: Rules = (
    Copy(f"{_ATTENTION}.q_layernorm.norms.{{e}}.weight", f"{BLOCK}.attn.q_norm.w"),
    Copy(f"{_ATTENTION}.k_layernorm.norms.{{e}}.weight", f"{BLOCK}.attn.k_norm.w"),
)

FAMILY = Family(
    name="stablelm",
    model_types=("stablelm",),
    architectures=("StableLmForCausalLM", "StableLmModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(attention=(*attention_rules(_ATTENTION), *_QK_NORMS)),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
