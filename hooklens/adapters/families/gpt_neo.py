"""GPT-Neo (Black et al. 2021, "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow").

Checkpoints: EleutherAI/gpt-neo-125m, -1.3B and -2.7B, roneneldan/TinyStories-* (Eldan and Li 2023).

Peculiarities:
- Scores are not scaled: `attn_scale` is 1.
- Layers see everything (`global`) or the latest `window_size` tokens (`local`), in turns in most checkpoints.
  `attention_types` says which; `attention_layers`, its expansion, is ignored.
- Queries, keys and values have no biases, all else has.
- Linear maps lie as `[out, in]`, in spite of GPT-2's names.
- transformers computes scores in float32 whatever the dtype of the model.
- Old files hold the causal mask of every layer; it is no weight.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    ActivationKey,
    Computed,
    ConfigMap,
    ConfigReader,
    FixedPositionKeys,
    Key,
    norm_key,
)
from hooklens.adapters.tables import BLOCK, Rules, attention_rules, decoder_rules, mlp_rules, norm_rules
from hooklens.config import LearnedPositions

_WINDOW_KEYS = ("attention_types", "window_size", "attention_layers")
# What transformers takes where the config is silent; it suits 24 layers only.
_DEFAULT_TYPES = [[["global", "local"], 12]]


def _read_windows(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`[[["global", "local"], 12]]` is both kinds in turns, twelve times."""
    reader.used.update(_WINDOW_KEYS)
    size, n_layers = reader.get("window_size", int, 256), len(reader.layers(fields.get("n_layers", 0)))
    kinds: list[str] = []
    for group in reader.entries("attention_types", list) if reader.has("attention_types") else _DEFAULT_TYPES:
        match group:
            case [list() as names, int() as times] if 0 <= times <= n_layers and {*map(repr, names)} <= _KINDS:
                kinds += [*names] * times
            case _:
                reader.reject("attention_types", "a list of pairs like [['global', 'local'], 12]")
                return {}
    if len(kinds) != n_layers:
        reader.reject("attention_types", f"one kind for each of {n_layers} layers; these are {len(kinds)}")
        return {}
    windows = tuple(size if kind == "local" else None for kind in kinds)
    return {"windows": windows if any(windows) else None}


_KINDS = {repr("global"), repr("local")}


def _write_windows(fields: Mapping[str, Any]) -> dict[str, Any]:
    windows = fields["windows"] or (None,) * fields["n_layers"]
    kinds = ["global" if window is None else "local" for window in windows]
    pairs = list(zip(kinds[::2], kinds[1::2], strict=False)) if len(kinds) % 2 == 0 else [(kind,) for kind in kinds]
    types = [[list(names), len(list(run))] for names, run in groupby(pairs)]
    # Several sizes differ from what is read back, and are refused there.
    size = next((window for window in windows if window is not None), 256)
    return {"attention_types": types, "window_size": size}


_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("hidden_size", "d_model", int),
        Key("num_layers", "n_layers", int, alias="num_hidden_layers"),
        Key("num_heads", "n_heads", int, alias="num_attention_heads"),
        Key("intermediate_size", "d_mlp", int, default=None),
        ActivationKey("activation_function", default="gelu_new"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(positions=LearnedPositions()),
        Computed(_WINDOW_KEYS, _read_windows, _write_windows),
    ),
    fixed={"attn_scale": 1.0, "qkv_bias": False, "out_bias": True, "mlp_bias": True},
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
    *attention_rules(f"{_LAYER}.attn.attention", o="out_proj"),
    *norm_rules(f"{_LAYER}.ln_2", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.mlp", up="c_fc", down="c_proj"),
)

FAMILY = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    architectures=("GPTNeoForCausalLM", "GPTNeoModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", pos_embed="transformer.wpe", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",),
)
