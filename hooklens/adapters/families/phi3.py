"""Phi-3 (Abdin et al. 2024, "Phi-3 Technical Report"), Phi-3.5, Phi-4 (Abdin et al. 2024, "Phi-4 Technical Report") and
Phi-4-mini; the long ones with LongRoPE (Ding et al. 2024).

Checkpoints: microsoft/Phi-3-mini-4k-instruct, Phi-3-mini-128k-instruct, Phi-3-medium-*, Phi-3.5-mini-instruct, phi-4,
Phi-4-mini-instruct and every other checkpoint whose `model_type` is `phi3`.

Peculiarities:
- Llama's network without biases; queries, keys and values lie in one tensor, one after the other, and so do the
  MLP's gate and linear half.
- One sliding window for all layers (2047 in Phi-3-mini-4k), none where the config is silent.
- LongRoPE: a sequence of more tokens than `original_max_position_embeddings` turns at other frequencies, at all its
  positions. That length is a flat key, 4096 where the config is silent, and ranks before the object's entry. `su` and
  `yarn` are old names of the same scaling (transformers 5 cannot read `su`); the family has no other.
- Phi-4-mini turns the first three quarters of each head (`partial_rotary_factor`) and ties the unembedding.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, WindowKeys, norm_key
from hooklens.adapters.tables import fused_gate_rules, fused_qkv_rules, llama_rules, out_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(
            default_n_ctx=4096,
            fraction="partial_rotary_factor",
            default_original=4096,
            scalings=("default", "longrope"),
            kinds={"su": "longrope", "yarn": "longrope"},
        ),
        WindowKeys(typed=False),
    ),
    fixed={"gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    pinned={
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
    },
)

_LAYER = "model.layers.{i}"

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=(
            *fused_qkv_rules(f"{_LAYER}.self_attn.qkv_proj", order="blocked"),
            *out_rules(f"{_LAYER}.self_attn.o_proj"),
        ),
        mlp=fused_gate_rules(f"{_LAYER}.mlp"),
    ),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
