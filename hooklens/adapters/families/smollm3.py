"""SmolLM3 (Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context reasoner").

Checkpoints: HuggingFaceTB/SmolLM3-3B-Base, SmolLM3-3B.

Peculiarities:
- Llama's network and names, where every fourth layer is not rotated. `no_rope_layers` says which: its entry is 1 where
  a layer **is** rotated.
- Windows, with `use_sliding_window`, are those of layers without rotation, where there are no `layer_types`. No
  published checkpoint has them.
- The unembedding is tied where the config is silent.
"""

from collections.abc import Sequence
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    ConfigReader,
    Key,
    LayeredRotary,
    PositionKeys,
    WindowKeys,
    all_but_every,
    norm_key,
)
from hooklens.adapters.keys.windows import SLIDING
from hooklens.adapters.tables import llama_rules

_FLAGS, _PERIOD, _SWITCH = "no_rope_layers", "no_rope_layer_interval", "use_sliding_window"
_every_fourth = all_but_every(4, _PERIOD)


def _is_bare(reader: ConfigReader, n_layers: int) -> list[bool]:
    """Which layers are not rotated."""
    flags = reader.by_layer(_FLAGS, int, n_layers)
    rotated = _every_fourth(reader, n_layers) if flags is None else [flag != 0 for flag in flags]
    return [not turns for turns in rotated]


def _unrotated(reader: ConfigReader, kinds: Sequence[str], window: int | None) -> list[bool]:
    if window is None and SLIDING in kinds and reader.has("sliding_window"):
        # There the window depends on what transformers attends with.
        reader.reject(_SWITCH, "true, where layer_types names layers that slide")
    return _is_bare(reader, len(kinds))


def _write_rotated(rotated: Sequence[bool]) -> dict[str, Any]:
    return {_FLAGS: [int(turns) for turns in rotated]}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        LayeredRotary(
            windows=WindowKeys(switch=_SWITCH, slides=_is_bare, slides_keys=(_FLAGS, _PERIOD)),
            rotary=PositionKeys(default_n_ctx=32768, default_base=2e6),
            unrotated=_unrotated,
            unrotated_keys=(_FLAGS, _PERIOD),
            write_unrotated=_write_rotated,
        ),
    ),
    fixed={"gated_mlp": True},
    inert=("max_window_layers",),
)

FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
