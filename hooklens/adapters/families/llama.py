"""Llama (Touvron et al. 2023a, 2023b; Grattafiori et al. 2024, "The Llama 3 Herd of Models").

Checkpoints: meta-llama/Llama-2-*, Meta-Llama-3*, Llama-3.1-*, Llama-3.2-1B and 3B, CodeLlama, TinyLlama, Vicuna,
and every other checkpoint whose `model_type` is `llama`.

Peculiarities:
- RMSNorm; the MLP is gated, `down(act(gate) * up)`: `W_in` is `up_proj`, `W_gate` is `gate_proj`.
- Key-value heads may be fewer than query heads (`num_key_value_heads`), and `head_dim` is a setting of its own.
- `attention_bias` covers four maps, but Qwen rewritten as Llama has no bias on the output.
- Llama-3.2 1B and 3B tie the unembedding; their files hold no `lm_head`.
- Files are in the half rotary layout (Meta's originals are interleaved; the conversion permuted them).
- Old files hold the rotary table of every layer; it is no weight.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(),
    ),
    fixed={"gated_mlp": True, "wiring": "sequential"},
    pinned={"rope_interleaved": False},
)

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
