"""Apertus (Apertus Team 2025, "Apertus: Democratizing Open and Compliant LLMs for Global Language Environments").

Checkpoints: swiss-ai/Apertus-8B-2509, Apertus-70B-2509 and their Instruct versions.

Peculiarities:
- The MLP has no gate; its activation is xIELU (Huang and Schlag 2024), with two learned numbers in each layer. Files
  hold its two constants, too, in their own dtype; they are no weights.
- Queries and keys are normed head by head. The norms are called `attention_layernorm` and `feedforward_layernorm`.
- Where the config says nothing of a rotation, it is Llama 3.1's with base 1.2e7 and factor 8.
- `post_norm` and `qk_norm` are notes of the training code that transformers does not read.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import QK_NORM, SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.rules import Constant, Copy
from hooklens.adapters.tables import BLOCK, llama_rules, mlp_rules

_DEFAULT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1.2e7,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="xielu", meaning={"xielu": "xielu"}),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=65536, default_base=1.2e7, default_rope=_DEFAULT_ROPE),
    ),
    fixed={"gated_mlp": False, "mlp_bias": False},
    pinned={"mlp_bias": False, "post_norm": False, "qk_norm": True},
)

_MLP = "model.layers.{i}.mlp"

FAMILY = Family(
    name="apertus",
    model_types=("apertus",),
    architectures=("ApertusForCausalLM", "ApertusModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        norms={"ln1": "attention_layernorm", "ln2": "feedforward_layernorm"},
        mlp=(
            *mlp_rules(_MLP, up="up_proj", down="down_proj"),
            Copy(f"{_MLP}.act_fn.alpha_p", f"{BLOCK}.mlp.alpha_p"),
            Copy(f"{_MLP}.act_fn.alpha_n", f"{BLOCK}.mlp.alpha_n"),
            Constant(f"{_MLP}.act_fn.beta", 0.5, beside=f"{BLOCK}.mlp.alpha_n"),
            Constant(f"{_MLP}.act_fn.eps", -1e-6, beside=f"{BLOCK}.mlp.alpha_n"),
        ),
    ),
)
