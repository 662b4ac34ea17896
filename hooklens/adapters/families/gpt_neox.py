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

from hooklens.adapters.config_map import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, norm_key
from hooklens.adapters.family import Family
from hooklens.adapters.positions import PositionKeys
from hooklens.adapters.rules import Copy, WeightRule, fused_qkv_rules, norm_rules

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
_BLOCK = "blocks.{i}"

_WEIGHTS: tuple[WeightRule, ...] = (
    Copy("gpt_neox.embed_in.weight", "embed.W_E"),
    *norm_rules(f"{_LAYER}.input_layernorm", f"{_BLOCK}.ln1", bias=True),
    *fused_qkv_rules(f"{_LAYER}.attention.query_key_value", f"{_BLOCK}.attn", order="grouped"),
    Copy(f"{_LAYER}.attention.dense.weight", f"{_BLOCK}.attn.W_O", "m (n h) -> n h m"),
    Copy(f"{_LAYER}.attention.dense.bias", f"{_BLOCK}.attn.b_O", when=lambda cfg: cfg.out_bias),
    *norm_rules(f"{_LAYER}.post_attention_layernorm", f"{_BLOCK}.ln2", bias=True),
    Copy(f"{_LAYER}.mlp.dense_h_to_4h.weight", f"{_BLOCK}.mlp.W_in", "f m -> m f"),
    Copy(f"{_LAYER}.mlp.dense_h_to_4h.bias", f"{_BLOCK}.mlp.b_in"),
    Copy(f"{_LAYER}.mlp.dense_4h_to_h.weight", f"{_BLOCK}.mlp.W_out", "m f -> f m"),
    Copy(f"{_LAYER}.mlp.dense_4h_to_h.bias", f"{_BLOCK}.mlp.b_out"),
    *norm_rules("gpt_neox.final_layer_norm", "ln_final", bias=True),
    Copy("embed_out.weight", "unembed.W_U", "v m -> m v", when=lambda cfg: not cfg.tied_unembed),
)

FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    base_prefix="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    config=_CONFIG,
    weights=_WEIGHTS,
    weightless=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    renamed={"lm_head.weight": "embed_out.weight"},
)
