"""The words in which TransformerLens describes a network (Nanda and Bloom 2022), and `HookedConfig`.

They are one flat list of fields, those of its `HookedTransformerConfig` and of the `config.json` beside its
checkpoints. Peculiarities:

- -1 stands for what is not given; sizes of the vocabulary are so until a tokenizer is known.
- `normalization` (in older files) or `normalization_type`: LayerNorm or RMSNorm; `...Pre` has neither weight nor bias,
  since they were folded into the maps behind it. `final_rms` makes the last norm an RMSNorm. eps is 1e-5 where it is
  not given.
- `use_normalization_before_and_after`: norms behind the branches keep their weights when those before are folded, so
  `RMSPre` is read as norms with weights, which are 1 where they were folded.
- `shortformer_pos`, or the positions `shortformer`: positions go to what queries and keys read.
- `attn_scale` divides the scores. Without `use_attn_scale` nothing does.
- Every map has a bias, but a gate, the linear half beside it, and all of a mixture of experts: which of them are 0 it
  does not say.
- Windows are causal: without causality all is seen.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from hooklens.adapters.keys import ConfigReader
from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    MoEConfig,
    NormConfig,
    PartConfig,
    RotaryPositions,
    RotaryScaling,
    ShortformerPositions,
)
from hooklens.config.combinations import BY_LAYER
from hooklens.errors import ConfigError, UnsupportedModelError

NEEDED = ("d_model", "n_layers", "n_heads", "d_vocab", "n_ctx", "act_fn")
"""What every description holds."""

_SIZES = {"d_head": "d_head", "d_mlp": "d_mlp", "n_key_value_heads": "n_kv_heads", "d_vocab_out": "d_vocab_out"}
_NORMS = ("LN", "LNPre", "RMS", "RMSPre")
_POSITIONS = ("standard", "rotary", "shortformer", "alibi")
_MOST_SHOWN = 120
_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "solu": "solu", "solu_ln": "solu_ln", "xielu": "xielu",
}  # fmt: skip
# Its class for this mixture of experts is chosen by the name of the architecture.
_CLAMPED = "GptOssForCausalLM"
_CLAMPED_MIXTURE: Mapping[str, Any] = {"router_bias": True, "expert_bias": True, "act_fn": "clamped_swiglu"}
# Settings that change the network and that nothing here stands for, with the value that leaves it as it is.
_PINNED: Mapping[str, Any] = {"load_in_4bit": False, "relative_attention_num_buckets": None}
# What the words leave open, since TransformerLens has it in its weights: which biases are 0, which weights are one
# tensor, a factor on the embedding, the 1 of a norm's weight, how fresh weights are drawn.
_IN_WEIGHTS = frozenset(
    {"tied_unembed", "init_std", "shared_norm", "document_mask", "d_mlp", "embed_scale", "embed_scale_rounded"}
)


def read_words(words: Mapping[str, Any], *, where: str) -> HookedConfig:
    """The network that TransformerLens's fields describe, with all biases that it has there.

    Args:
        words: its fields by name; others may stand beside them.
        where: what texts of errors call them.

    Raises:
        UnsupportedModelError: values that are missing, of another kind, or not implemented; all are listed.
    """
    config = {key: value for key, value in words.items() if value not in (-1, -1.0)}
    reader = ConfigReader(config)
    for setting, harmless in _PINNED.items():
        if config.get(setting) not in (None, harmless):
            reader.reject(setting, f"{harmless!r}, or nothing")
    try:
        fields = _read_fields(reader)
        if not reader.problems:
            return HookedConfig(**fields)
    except ConfigError as error:
        reader.problems.append(str(error))
    raise UnsupportedModelError(
        f"{where}: describes a network that HookLens cannot build: {'; '.join(reader.problems)}"
    )


def _read_fields(reader: ConfigReader) -> dict[str, Any]:
    """The fields of `HookedConfig`; what is wrong goes into the reader's problems."""
    sizes = {key: reader.get(key, int) for key in NEEDED if key != "act_fn"}
    sizes |= {name: size for key, name in _SIZES.items() if (size := reader.get(key, int, None)) is not None}
    key = "normalization" if reader.has("normalization") else "normalization_type"
    kind = reader.get(key, str, None)
    if kind is not None and kind not in _NORMS:
        reader.reject(key, f"one of {', '.join(map(repr, _NORMS))}, or null")
    act_fn = reader.get("act_fn", str, "relu")
    if act_fn not in _ACTIVATIONS:
        reader.reject("act_fn", f"one of {', '.join(map(repr, _ACTIVATIONS))}")
    direction = reader.get("attention_dir", str, "causal")
    if direction not in {"causal", "bidirectional"}:
        reader.reject("attention_dir", "'causal' or 'bidirectional'")
    eps, gated = reader.get("eps", float, 1e-5), reader.get("gated_mlp", bool, False)
    attn_only, n_layers = reader.get("attn_only", bool, False), reader.layers(sizes["n_layers"])
    is_local = _read_local(reader, len(n_layers))
    window = reader.get("window_size", int) if any(is_local) else None
    return {
        **sizes,
        **_read_norms(reader, kind, eps),
        "attn_only": attn_only,
        "act_fn": _ACTIVATIONS.get(act_fn, "relu"),
        # The norm behind SoLU is a LayerNorm whatever the others are.
        "act_norm": _norm("LN" if kind == "LN" else "LNPre", eps) if act_fn == "solu_ln" else None,
        "gated_mlp": gated,
        **({} if attn_only else _read_mixture(reader, sizes)),
        "causal": direction == "causal",
        "wiring": "parallel" if reader.get("parallel_attn_mlp", bool, False) else "sequential",
        "positions": _read_positions(reader, sizes, is_local),
        "windows": tuple(window if one else None for one in is_local) if window and direction == "causal" else None,
        "attn_scale": _read_scale(reader, sizes),
        "attn_softcap": _read_cap(reader, "attn_scores_soft_cap"),
        "logits_softcap": _read_cap(reader, "output_logits_soft_cap"),
        "unembed_bias": True,
        **({"mlp_gate_bias": False, "mlp_in_bias": False} if gated else {}),
    }


def _read_norms(reader: ConfigReader, kind: str | None, eps: float) -> dict[str, Any]:
    after = reader.get("use_normalization_before_and_after", bool, False) and kind is not None
    if after and kind in {"LN", "LNPre"}:
        reader.reject("use_normalization_before_and_after", "false, but with RMSNorms")
    norm = _norm("RMS" if after else kind, eps)
    final_rms = reader.get("final_rms", bool, False) and kind is not None
    qk_norm, embed_norm = (reader.get(key, bool, False) for key in ("use_qk_norm", "post_embedding_ln"))
    last = ("RMSPre" if kind in {"LNPre", "RMSPre"} else "RMS") if final_rms else kind
    return {
        "norm": norm,
        "norm_after": after,
        "final_norm": _norm(last, eps),
        "qk_norm": _norm("RMS", eps) if qk_norm else None,
        "embed_norm": _norm("LN", eps) if embed_norm else None,
    }


def _norm(kind: str | None, eps: float) -> NormConfig | None:
    if kind is None:
        return None
    has_weight = not kind.endswith("Pre")
    if kind.startswith("RMS"):
        return NormConfig(kind="rms", eps=eps, weight=has_weight, bias=False)
    return NormConfig(kind="layer", eps=eps, weight=has_weight, bias=has_weight)


def _read_cap(reader: ConfigReader, key: str) -> float | None:
    """A soft cap; 0 and less are none."""
    cap: float | None = reader.get(key, float, None)
    return cap if cap is not None and cap > 0 else None


def _read_mixture(reader: ConfigReader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    n_experts = reader.get("num_experts", int, None)
    if not n_experts:
        return {}
    clamped = reader.get("original_architecture", str, None) == _CLAMPED
    mixture = MoEConfig(
        n_experts=n_experts,
        experts_per_token=reader.get("experts_per_token", int) or 1,
        d_expert=sizes.get("d_mlp", 4 * sizes["d_model"]),
        gate_norm=1.0,
        **(_CLAMPED_MIXTURE if clamped else {}),
    )
    return {"mlp": mixture}


def _read_local(reader: ConfigReader, n_layers: int) -> list[bool]:
    """Which layers attend to a window."""
    if not reader.get("use_local_attn", bool, False):
        return [False] * n_layers
    types = reader.entries("attn_types", str)
    if unknown := sorted({one for one in types if one not in {"global", "local"}}):
        reader.reject("attn_types", f"'global' or 'local' for each layer, not {', '.join(map(repr, unknown))}")
    elif types and len(types) < n_layers:
        reader.reject("attn_types", f"one for each of {n_layers} layers")
    # Of a network that was cut short, all may still be named.
    return [one == "local" for one in types[:n_layers]]


def _read_scale(reader: ConfigReader, sizes: Mapping[str, Any]) -> float | tuple[float, ...] | None:
    """The factor on scores, in each layer where they differ; None: the usual one."""
    usual = math.sqrt(sizes.get("d_head", sizes["d_model"] / max(1, sizes["n_heads"])))
    divisor = reader.get("attn_scale", float, usual)
    if not reader.get("use_attn_scale", bool, True):
        divisor = 1.0
    if divisor <= 0:
        reader.reject("attn_scale", "a number above 0")
        return None
    if reader.get("scale_attn_by_inverse_layer_idx", bool, False):
        return tuple(1.0 / (divisor * (layer + 1)) for layer in reader.layers(sizes["n_layers"]))
    return None if math.isclose(divisor, usual, rel_tol=1e-12) else 1.0 / divisor


def _read_positions(reader: ConfigReader, sizes: Mapping[str, Any], is_local: list[bool]) -> Any:
    kind = reader.get("positional_embedding_type", str, "standard")
    if reader.get("shortformer_pos", bool, False):
        kind = "shortformer"
    if kind not in _POSITIONS:
        reader.reject("positional_embedding_type", f"one of {', '.join(map(repr, _POSITIONS))}")
    if kind == "rotary":
        return _read_rotary(reader, sizes, is_local)
    n_heads = sizes["n_heads"]
    if kind == "alibi" and n_heads & (n_heads - 1):
        reader.reject(
            "positional_embedding_type",
            f"others for {n_heads} heads, which is no power of two: TransformerLens's slopes are not those of Press et "
            "al. 2022 then",
        )
    simple = {"shortformer": ShortformerPositions, "alibi": AlibiPositions}
    return simple.get(kind, LearnedPositions)()


def _read_rotary(reader: ConfigReader, sizes: Mapping[str, Any], is_local: list[bool]) -> Any:
    scaling = None
    if reader.get("use_NTK_by_parts_rope", bool, False):
        scaling = RotaryScaling(
            kind="llama3",
            factor=reader.get("NTK_by_parts_factor", float, 8.0),
            low_freq_factor=reader.get("NTK_by_parts_low_freq_factor", float, 1.0),
            high_freq_factor=reader.get("NTK_by_parts_high_freq_factor", float, 4.0),
            original_n_ctx=reader.get("NTK_original_ctx_len", int, 8192),
        )
    everywhere = RotaryPositions(
        dim=reader.get("rotary_dim", int, sizes.get("d_head", sizes["d_model"] // max(1, sizes["n_heads"]))),
        base=reader.get("rotary_base", float, 10000.0),
        layout="interleaved" if reader.get("rotary_adjacent_pairs", bool, False) else "half",
        scaling=scaling,
    )
    base = reader.get("rotary_base_local", float, None)
    if base is None or not any(is_local):
        return everywhere
    local = dataclasses.replace(everywhere, base=base)
    return tuple(local if one else everywhere for one in is_local)


def write_words(cfg: HookedConfig) -> tuple[dict[str, Any], list[str]]:
    """TransformerLens's fields that describe a network, or come nearest to it, and what they do not say.

    They do not say what TransformerLens has in its weights: which biases are 0, which weights are one tensor, a factor
    on the embedding, the 1 that is added to a norm's weight, how fresh weights are drawn. All else that `read_words`
    would read otherwise is listed: `field=value`.
    """
    norm = _first(cfg.norm)
    shown = norm or cfg.final_norm
    scale = _first(cfg.attn_scale)
    by_layer = isinstance(cfg.attn_scale, tuple)
    mixture = _first(cfg.mlp) if isinstance(_first(cfg.mlp), MoEConfig) else None
    words: dict[str, Any] = {
        **{name: getattr(cfg, name) for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_vocab")},
        "d_vocab_out": cfg.d_vocab_out,
        "d_mlp": None if cfg.attn_only else cfg.d_mlp if mixture is None else mixture.d_expert,
        "act_fn": None if cfg.attn_only else _name_activation(cfg),
        "attn_only": cfg.attn_only,
        "gated_mlp": cfg.gated_mlp,
        "n_key_value_heads": None if cfg.n_kv_heads == cfg.n_heads else cfg.n_kv_heads,
        "eps": shown.eps if shown is not None else cfg.act_norm.eps if cfg.act_norm is not None else 1e-5,
        "normalization_type": None if norm is None else _name_norm(norm),
        "final_rms": cfg.final_norm is not None and cfg.final_norm.kind == "rms",
        "use_normalization_before_and_after": bool(_first(cfg.norm_after)),
        "use_qk_norm": _first(cfg.qk_norm) is not None,
        "post_embedding_ln": cfg.embed_norm is not None,
        "attention_dir": "causal" if cfg.causal else "bidirectional",
        "parallel_attn_mlp": cfg.wiring == "parallel",
        "use_attn_scale": by_layer or scale != 1.0,
        "scale_attn_by_inverse_layer_idx": by_layer,
        "attn_scores_soft_cap": cfg.attn_softcap or -1.0,
        "output_logits_soft_cap": cfg.logits_softcap or -1.0,
        "original_architecture": next(iter(_original(cfg).get("architectures") or ()), None),
        **_name_windows(cfg),
        **_name_positions(cfg),
    }
    if scale not in (None, 1.0):
        # The nearest double to what was divided by.
        words["attn_scale"] = 1.0 / scale
    if mixture is not None:
        words |= {"num_experts": mixture.n_experts, "experts_per_token": mixture.experts_per_token}
        words |= {"original_architecture": _CLAMPED} if mixture.act_fn == "clamped_swiglu" else {}
    try:
        again = read_words(words, where="config")
    except UnsupportedModelError as error:
        return words, [str(error)]
    return words, _differences(cfg, again)


def _first(value: Any) -> Any:
    """The value of the first layer that has one."""
    return next((one for one in value if one is not None), None) if isinstance(value, tuple) else value


def _name_norm(norm: NormConfig) -> str:
    return ("RMS" if norm.kind == "rms" else "LN") + ("" if norm.weight else "Pre")


def _name_activation(cfg: HookedConfig) -> str:
    """The word for the activation; one function has several, of which the config it was read from used one."""
    names = [word for word, meant in _ACTIVATIONS.items() if meant == cfg.act_fn]
    original = _original(cfg)
    used = [original.get(key) for key in ("hidden_activation", "hidden_act", "activation_function")]
    return next((name for name in names if name in used), names[0] if names else cfg.act_fn)


def _original(cfg: HookedConfig) -> dict[str, Any]:
    """The config that this one was read from."""
    return json.loads(cfg.origin.hub_config) if cfg.origin is not None else {}


def _name_windows(cfg: HookedConfig) -> dict[str, Any]:
    if not cfg.windows or _first(cfg.windows) is None:
        return {}
    types = ["global" if window is None else "local" for window in cfg.windows]
    return {"use_local_attn": True, "window_size": _first(cfg.windows), "attn_types": types}


def _name_positions(cfg: HookedConfig) -> dict[str, Any]:
    kinds: dict[type, str] = {ShortformerPositions: "shortformer", AlibiPositions: "alibi", RotaryPositions: "rotary"}
    each = cfg.positions if isinstance(cfg.positions, tuple) else (cfg.positions,) * cfg.n_layers
    local = next((one for one, window in zip(each, cfg.windows or (), strict=False) if window is not None), None)
    wide = next(
        (one for one, window in zip(each, cfg.windows or (None,) * len(each), strict=False) if not window), None
    )
    shown = wide or local or cfg.positions
    words: dict[str, Any] = {"positional_embedding_type": kinds.get(type(shown), "standard")}
    if not isinstance(shown, RotaryPositions):
        return words
    words |= {"rotary_dim": shown.dim, "rotary_base": _whole(shown.base)}
    words["rotary_adjacent_pairs"] = shown.layout == "interleaved"
    if isinstance(local, RotaryPositions) and local.base != shown.base:
        words["rotary_base_local"] = _whole(local.base)
    scaling = shown.scaling
    if scaling is not None and scaling.kind == "llama3":
        words |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": scaling.factor,
            "NTK_by_parts_low_freq_factor": scaling.low_freq_factor,
            "NTK_by_parts_high_freq_factor": scaling.high_freq_factor,
            "NTK_original_ctx_len": scaling.original_n_ctx,
        }
    return words


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def _differences(cfg: HookedConfig, again: HookedConfig) -> list[str]:
    """The fields in which a network read back differs, as they are in the first."""
    unread = {"act_fn", "act_norm", "gated_mlp", "swiglu_limit", "swiglu_alpha"} if cfg.attn_only else set()
    if isinstance(cfg.mlp, MoEConfig):
        # Its experts are gated anyway, and may have an activation of their own.
        unread |= {"gated_mlp"} | ({"act_fn"} if cfg.mlp.act_fn is not None else set())
    return [
        f"{spec.name}={_shorten(repr(getattr(cfg, spec.name)))}"
        for spec in dataclasses.fields(cfg)
        if spec.compare
        and spec.name not in unread | _IN_WEIGHTS
        and not spec.name.endswith("_bias")
        and _spread(cfg, spec.name) != _spread(again, spec.name)
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _spread(cfg: HookedConfig, name: str) -> Any:
    """A field's value for comparison: of each layer, where layers may differ, and without what moves no float32."""
    value = getattr(cfg, name)
    if name not in BY_LAYER:
        return _plain(value)
    each = value if isinstance(value, tuple) else (value,) * cfg.n_layers
    return tuple(map(_plain, each))


def _plain(value: Any) -> Any:
    if isinstance(value, NormConfig):
        return dataclasses.replace(value, wide_weight=False, unit_offset=False)
    if isinstance(value, MoEConfig):
        return dataclasses.replace(value, router_float32=False)
    if isinstance(value, PartConfig | RotaryPositions):
        return value
    return float(f"{value:.12g}") if isinstance(value, float) else value
