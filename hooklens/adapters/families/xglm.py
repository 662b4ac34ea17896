"""XGLM (Lin et al. 2021, "Few-shot Learning with Multilingual Language Models").

Checkpoints: facebook/xglm-564M, -1.7B, -2.9B, -4.5B and -7.5B, facebook/incoder-1B and -6B (Fried et al. 2022).

Peculiarities:
- Positions are sinusoids, as tensor2tensor makes them: all sines, then all cosines, and the last wave is the base's;
  position p has the angles of p + 2. They are no parameters, and no tensor of the files.
- The token embedding is multiplied by the root of its width (`scale_embedding`).
- The norms' epsilon is always 1e-5. The norm before the MLP has the name `final_layer_norm`; the last one is
  `layer_norm`.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import ActivationKey, ConfigMap, FixedPositionKeys, Key, embed_scale_flag
from hooklens.adapters.tables import decoder_rules, fairseq_block_rules
from hooklens.config import NormConfig, SinusoidalPositions

_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("d_model", "d_model", int, alias="hidden_size"),
        Key("num_layers", "n_layers", int, alias="num_hidden_layers"),
        Key("attention_heads", "n_heads", int, alias="num_attention_heads"),
        Key("ffn_dim", "d_mlp", int),
        ActivationKey("activation_function", default="gelu"),
        embed_scale_flag("scale_embedding", default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("init_std", "init_std", float, default=0.02),
        FixedPositionKeys(positions=SinusoidalPositions(layout="half", includes_base=True, offset=2)),
    ),
    fixed={"norm": NormConfig(kind="layer", eps=1e-5)},
)

FAMILY = Family(
    name="xglm",
    model_types=("xglm",),
    architectures=("XGLMForCausalLM", "XGLMModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(
        fairseq_block_rules("model.layers.{i}"), embed="model.embed_tokens", final_norm="model.layer_norm"
    ),
    weightless=(r"model\.embed_positions\.weights",),
)
