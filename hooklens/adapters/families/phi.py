"""Phi (Gunasekar et al. 2023, "Textbooks Are All You Need"; Li et al. 2023, "Textbooks Are All You Need II: phi-1.5
technical report"; Javaheripi et al. 2023, "Phi-2: The surprising power of small language models").

Checkpoints: microsoft/phi-1, phi-1_5, phi-2.

Peculiarities:
- Attention and MLP read the same stream through one LayerNorm: there is no second norm.
- Every map has a bias, the unembedding's included. It stays where `tie_word_embeddings` is on, as in no published one.
- Rotary turns the first half of each head where the config is silent (phi-1 and phi-1_5 say 0.5, phi-2 says 0.4).
- `qk_layernorm`: a LayerNorm with bias over each head's query and key, one for all heads. No published model has it.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, norm_key, qk_norm_flag
from hooklens.adapters.tables import attention_rules, llama_rules, mlp_rules, qk_norm_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="gelu_new"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5),
        qk_norm_flag(),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(fraction="partial_rotary_factor", default_fraction=0.5),
    ),
    fixed={"wiring": "parallel", "shared_norm": True, "unembed_bias": True},
)

_LAYER = "model.layers.{i}"

FAMILY = Family(
    name="phi",
    model_types=("phi",),
    architectures=("PhiForCausalLM", "PhiModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        norms={"ln1": "input_layernorm"},
        attention=(
            *attention_rules(f"{_LAYER}.self_attn", o="dense"),
            *qk_norm_rules(f"{_LAYER}.self_attn", q="q_layernorm", k="k_layernorm"),
        ),
        mlp=mlp_rules(f"{_LAYER}.mlp", up="fc1", down="fc2"),
        final_norm="final_layernorm",
    ),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
