"""BioGPT (Luo et al. 2022, "BioGPT: generative pre-trained transformer for biomedical text generation and mining").

Checkpoints: microsoft/biogpt, BioGPT-Large and their fine-tunes.

Peculiarities:
- The token embedding is multiplied by the root of its width (`scale_embedding`).
- The table of positions has two rows before position 0.
- The norms' epsilon is always 1e-5: `layer_norm_eps`, 1e-12 in the configs, is ignored.
- The norm before the MLP has the name `final_layer_norm`; the last one is `layer_norm`.
- The unembedding has the name `output_projection`.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    FixedPositionKeys,
    Key,
    embed_scale_flag,
)
from hooklens.adapters.tables import decoder_rules, fairseq_block_rules
from hooklens.config import LearnedPositions, NormConfig

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="gelu"),
        embed_scale_flag("scale_embedding", default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(positions=LearnedPositions(offset=2), default_n_ctx=1024),
    ),
    fixed={"norm": NormConfig(kind="layer", eps=1e-5)},
    inert=("layer_norm_eps",),
)

FAMILY = Family(
    name="biogpt",
    model_types=("biogpt",),
    architectures=("BioGptForCausalLM", "BioGptModel"),
    base_prefix="biogpt.",
    embedding="biogpt.embed_tokens.weight",
    head="output_projection.weight",
    config=_CONFIG,
    weights=decoder_rules(
        fairseq_block_rules("biogpt.layers.{i}"),
        embed="biogpt.embed_tokens",
        pos_embed="biogpt.embed_positions",
        final_norm="biogpt.layer_norm",
        head="output_projection",
    ),
)
