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

from hooklens.adapters.config_map import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, norm_key
from hooklens.adapters.family import Family
from hooklens.adapters.positions import PositionKeys
from hooklens.adapters.rules import Copy, WeightRule, norm_rules

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

_LAYER = "model.layers.{i}"
_ATTN, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"
_BLOCK = "blocks.{i}"

_WEIGHTS: tuple[WeightRule, ...] = (
    Copy("model.embed_tokens.weight", "embed.W_E"),
    *norm_rules(f"{_LAYER}.input_layernorm", f"{_BLOCK}.ln1", bias=False),
    Copy(f"{_ATTN}.q_proj.weight", f"{_BLOCK}.attn.W_Q", "(n h) m -> n m h"),
    Copy(f"{_ATTN}.k_proj.weight", f"{_BLOCK}.attn.W_K", "(n h) m -> n m h"),
    Copy(f"{_ATTN}.v_proj.weight", f"{_BLOCK}.attn.W_V", "(n h) m -> n m h"),
    Copy(f"{_ATTN}.o_proj.weight", f"{_BLOCK}.attn.W_O", "m (n h) -> n h m"),
    Copy(f"{_ATTN}.q_proj.bias", f"{_BLOCK}.attn.b_Q", "(n h) -> n h", when=lambda cfg: cfg.qkv_bias),
    Copy(f"{_ATTN}.k_proj.bias", f"{_BLOCK}.attn.b_K", "(n h) -> n h", when=lambda cfg: cfg.qkv_bias),
    Copy(f"{_ATTN}.v_proj.bias", f"{_BLOCK}.attn.b_V", "(n h) -> n h", when=lambda cfg: cfg.qkv_bias),
    Copy(f"{_ATTN}.o_proj.bias", f"{_BLOCK}.attn.b_O", when=lambda cfg: cfg.out_bias),
    *norm_rules(f"{_LAYER}.post_attention_layernorm", f"{_BLOCK}.ln2", bias=False),
    Copy(f"{_MLP}.up_proj.weight", f"{_BLOCK}.mlp.W_in", "f m -> m f"),
    Copy(f"{_MLP}.gate_proj.weight", f"{_BLOCK}.mlp.W_gate", "f m -> m f"),
    Copy(f"{_MLP}.down_proj.weight", f"{_BLOCK}.mlp.W_out", "m f -> f m"),
    Copy(f"{_MLP}.up_proj.bias", f"{_BLOCK}.mlp.b_in", when=lambda cfg: cfg.mlp_bias),
    Copy(f"{_MLP}.gate_proj.bias", f"{_BLOCK}.mlp.b_gate", when=lambda cfg: cfg.mlp_bias),
    Copy(f"{_MLP}.down_proj.bias", f"{_BLOCK}.mlp.b_out", when=lambda cfg: cfg.mlp_bias),
    *norm_rules("model.norm", "ln_final", bias=False),
    Copy("lm_head.weight", "unembed.W_U", "v m -> m v", when=lambda cfg: not cfg.tied_unembed),
)

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=_WEIGHTS,
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
