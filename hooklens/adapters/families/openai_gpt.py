"""GPT (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training").

Checkpoints: openai-community/openai-gpt and its fine-tunes.

Peculiarities:
- Norms are of the stream itself, behind each branch's sum, and there is none before the unembedding: the stream is no
  sum of what was written to it.
- `afn: "gelu"` means the tanh approximation.
- Linear maps lie as `[in, out]` (`Conv1D`), as GPT-2's; the MLP is four times as wide as the stream.
- The norms' and maps' names are GPT-2's, those of the embeddings are not.
- The published file begins at the base model, and holds the causal mask of every layer, which is no weight.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SHORT_SIZE_KEYS, ActivationKey, ConfigMap, FixedPositionKeys, Key, norm_key
from hooklens.adapters.tables import (
    BLOCK,
    Rules,
    decoder_rules,
    fused_conv1d_qkv_rules,
    mlp_rules,
    norm_rules,
    out_rules,
)
from hooklens.config import LearnedPositions

_CONFIG = ConfigMap(
    parts=(
        *SHORT_SIZE_KEYS,
        ActivationKey("afn", default="gelu", meaning={"gelu": "gelu_tanh"}),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(
            positions=LearnedPositions(), n_ctx="n_positions", alias="max_position_embeddings", default_n_ctx=512
        ),
    ),
    fixed={"norm_before": False, "norm_stream": True, "final_norm": None},
    inert=("n_ctx", "n_special", "predict_special_tokens"),
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *fused_conv1d_qkv_rules(f"{_LAYER}.attn.c_attn"),
    *out_rules(f"{_LAYER}.attn.c_proj", conv1d=True),
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1_stream"),
    *mlp_rules(f"{_LAYER}.mlp", up="c_fc", down="c_proj", conv1d=True),
    *norm_rules(f"{_LAYER}.ln_2", f"{BLOCK}.ln2_stream"),
)

FAMILY = Family(
    name="openai_gpt",
    model_types=("openai-gpt",),
    architectures=("OpenAIGPTLMHeadModel", "OpenAIGPTModel"),
    base_prefix="transformer.",
    embedding="transformer.tokens_embed.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(
        _BLOCKS, embed="transformer.tokens_embed", pos_embed="transformer.positions_embed", final_norm=None
    ),
    weightless=(r"transformer\.h\.\d+\.attn\.bias",),
    peculiar=dict.fromkeys((f"{_LAYER}.mlp.act.input", f"{_LAYER}.mlp.act.output"), "all layers share this module"),
)
