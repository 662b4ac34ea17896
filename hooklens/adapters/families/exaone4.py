"""EXAONE 4 (LG AI Research 2025, "EXAONE 4.0: Unified Large Language Models").

Checkpoints: LGAI-EXAONE/EXAONE-4.0-32B (windows), EXAONE-4.0-1.2B (none), EXAONE-4.0.1-32B.

Peculiarities:
- RMSNorms after each branch and none before, as in OLMo 2; queries and keys are normed head by head.
- Where there is a window, only layers that slide are rotated, and the others know no positions; where
  `sliding_window` is null, all are rotated.
- Three layers slide, the fourth sees all, where there are no `layer_types` (`sliding_window_pattern`); a pattern
  spelled in letters ("LLLG") needs `layer_types`, as in transformers.
"""

from collections.abc import Sequence

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    ConfigReader,
    Key,
    LayeredRotary,
    PositionKeys,
    WindowKeys,
    all_but_every,
    norm_key,
)
from hooklens.adapters.keys.windows import FULL
from hooklens.adapters.tables import POST_NORMS, llama_rules

_PERIOD = "sliding_window_pattern"
_every_fourth = all_but_every(4, _PERIOD)


def _slides(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    # A network without windows says so with a null period, or a period of 0, too.
    return [False] * n_layers if reader.is_null("sliding_window") else _every_fourth(reader, n_layers)


def _sees_all(reader: ConfigReader, kinds: Sequence[str], window: int | None) -> list[bool]:
    return [window is not None and kind == FULL for kind in kinds]


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        QK_NORM,
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        LayeredRotary(
            windows=WindowKeys(default=4096, slides=_slides, slides_keys=(_PERIOD,)),
            rotary=PositionKeys(),
            unrotated=_sees_all,
        ),
    ),
    fixed={
        "gated_mlp": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "norm_before": False,
        "norm_after": True,
    },
    inert=("cache_implementation",),
)

FAMILY = Family(
    name="exaone4",
    model_types=("exaone4",),
    architectures=("Exaone4ForCausalLM", "Exaone4Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(norms=POST_NORMS),
)
