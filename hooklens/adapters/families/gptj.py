"""GPT-J (Wang and Komatsuzaki 2021, "GPT-J-6B").

Checkpoints: EleutherAI/gpt-j-6b and its fine-tunes (GPT4All-J, Dolly v1, instruct-GPT-J).

Peculiarities:
- Attention and MLP run in parallel and read one norm.
- Rotary turns the first `rotary_dim` entries of each head in pairs of neighbours; its base is always 10000 and there is
  no scaling.
- Attention has no biases; the MLP and the unembedding always have. The bias stays where `tie_word_embeddings` is on, as
  in no published model.
- transformers computes scores in float32 whatever the dtype of the model.
- Old files hold the causal mask of every layer; it is no weight.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SHORT_SIZE_KEYS, ActivationKey, ConfigMap, Key, norm_key, rotary_dim_keys
from hooklens.adapters.tables import BLOCK, Rules, attention_rules, decoder_rules, mlp_rules, norm_rules

_CONFIG = ConfigMap(
    parts=(
        *SHORT_SIZE_KEYS,
        Key("n_inner", "d_mlp", int, default=None),
        ActivationKey("activation_function", default="gelu_new"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Key("initializer_range", "init_std", float, default=0.02),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        rotary_dim_keys(n_ctx="n_positions", alias="max_position_embeddings"),
    ),
    fixed={
        "wiring": "parallel",
        "shared_norm": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": True,
        "unembed_bias": True,
    },
    pinned={"rotary": True, "scale_attn_weights": True},
    # `n_ctx` repeats `n_positions`.
    inert=("n_ctx",),
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
    *attention_rules(f"{_LAYER}.attn", o="out_proj"),
    *mlp_rules(f"{_LAYER}.mlp", up="fc_in", down="fc_out"),
)

FAMILY = Family(
    name="gptj",
    model_types=("gptj",),
    architectures=("GPTJForCausalLM", "GPTJModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
