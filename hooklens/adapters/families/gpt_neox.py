"""GPT-NeoX (Black et al. 2022, "GPT-NeoX-20B") and Pythia (Biderman et al. 2023).

Checkpoints: EleutherAI/gpt-neox-20b, EleutherAI/pythia-*, and fine-tunes of them (Dolly v2, StableLM alpha,
RedPajama-INCITE).

Peculiarities:
- Attention and MLP read the same stream through two norms of their own (`use_parallel_residual`), or run one
  after the other (RedPajama-INCITE).
- Query, key and value of a head lie together in one tensor: groups of one key-value head.
- Rotary turns only the first `rotary_pct` of each head; that fraction is 0.25 where the config is silent.
- `attention_bias` covers the query-key-value map and the output map; the MLP always has biases.
- Files call the unembedding `embed_out`; transformers 5 calls it `lm_head` in memory and renames on save.
- Old files hold the causal mask and the rotary table of every layer; they are no weights.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import BLOCK, Rules, decoder_rules, fused_qkv_rules, mlp_rules, norm_rules, out_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="gelu"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5),
        Key(
            "use_parallel_residual",
            "wiring",
            bool,
            default=True,
            decode=lambda parallel: "parallel" if parallel else "sequential",
            encode=lambda wiring: wiring == "parallel",
        ),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ),
    fixed={"mlp_bias": True},
)

_LAYER = "gpt_neox.layers.{i}"

_WEIGHTS: Rules = (
    *norm_rules(f"{_LAYER}.input_layernorm", f"{BLOCK}.ln1"),
    *fused_qkv_rules(f"{_LAYER}.attention.query_key_value", order="grouped"),
    *out_rules(f"{_LAYER}.attention.dense"),
    *norm_rules(f"{_LAYER}.post_attention_layernorm", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
)

FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    base_prefix="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    config=_CONFIG,
    weights=decoder_rules(
        _WEIGHTS, embed="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm", head="embed_out"
    ),
    weightless=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    renamed={"lm_head.weight": "embed_out.weight"},
)
