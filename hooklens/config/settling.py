"""A network's description as it was given, checked value by value, and what was left out filled in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from hooklens.config.activations import read_activation, settle_activation
from hooklens.config.attention import AttentionBackend, NormOver, QueryTemperature
from hooklens.config.block import PartConfig, read_part
from hooklens.config.checks import (
    check_choice,
    check_counts,
    check_flags,
    check_kind,
    check_numbers,
    check_present,
    refuse,
)
from hooklens.config.combinations import combination_problems
from hooklens.config.latent import find_latent
from hooklens.config.norms import NormConfig
from hooklens.config.stream import BIASES_OF_ONE, check_stream_numbers, settle_biases
from hooklens.errors import ConfigError

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

Wiring = Literal["sequential", "parallel"]
InitScheme = Literal[
    "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP", "small", "wang"
]
# A value that was left out, where None says that there is none.
LEFT_OUT: Any = object()
_SIZES = ("d_model", "n_heads", "d_vocab", "n_ctx")
_DERIVED_SIZES = ("n_kv_heads", "d_head", "d_mlp", "d_vocab_out", "d_embed")
_FLAGS = (
    "gated_mlp",
    "shared_norm",
    "norm_stream",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "unembed_bias",
    "tied_unembed",
    "causal",
    "document_mask",
    "qk_norm_per_head",
    "qk_norm_after_rotary",
    "attn_sinks",
    "embed_scale_rounded",
)
_FLAGS_BY_LAYER = ("norm_before", "norm_after")
ATTENTION, _MLP = PartConfig(kind="attention"), PartConfig(kind="mlp")
# Values that have fields of their own.
PARTS: dict[str, type] = {
    "norm": NormConfig,
    "final_norm": NormConfig,
    "embed_norm": NormConfig,
    "act_norm": NormConfig,
    "qk_norm": NormConfig,
    "attn": PartConfig,
    "mlp": PartConfig,
    "query_temperature": QueryTemperature,
}


def settle(cfg: "HookedConfig") -> None:
    """Check a description that has just been made, and fill in what follows from the rest.

    Raises:
        ConfigError: values of a wrong kind, or a combination that is no network, with all reasons.
    """
    given = vars(cfg)
    check_present("config", {name: given[name] for name in (*_SIZES, "n_layers", "init_std")})
    check_counts("config", {name: given[name] for name in (*_SIZES, *_DERIVED_SIZES)})
    check_counts("config", {"n_layers": cfg.n_layers}, at_least=0)
    check_flags("config", {name: given[name] for name in _FLAGS})
    for name in _FLAGS_BY_LAYER:
        each = given[name] if isinstance(given[name], tuple) else (given[name],)
        check_flags(f"config: {name}", {f"layer {i}" if len(each) > 1 else name: one for i, one in enumerate(each)})
    said = ("attn_only", *BIASES_OF_ONE)
    check_flags("config", {name: given[name] for name in said if given[name] is not None})
    check_numbers(
        "config",
        {
            "attn_softcap": cfg.attn_softcap,
            "clip_qkv": cfg.clip_qkv,
            "logits_softcap": cfg.logits_softcap,
            "embed_scale": cfg.embed_scale,
            "swiglu_limit": cfg.swiglu_limit,
            "swiglu_alpha": cfg.swiglu_alpha,
        },
    )
    scales = cfg.attn_scale if isinstance(cfg.attn_scale, tuple) else (cfg.attn_scale,)
    check_numbers("config: attn_scale", {f"layer {i}": one for i, one in enumerate(scales)})
    check_stream_numbers(cfg)
    check_numbers("config", {"init_std": cfg.init_std}, at_least=0.0)
    _fill_in_sizes(cfg)
    object.__setattr__(cfg, "act_fn", read_activation(cfg.act_fn))
    check_choice("config: wiring", cfg.wiring, get_args(Wiring))
    check_choice("config: init_scheme", cfg.init_scheme, get_args(InitScheme))
    check_choice("config: qk_norm_over", cfg.qk_norm_over, get_args(NormOver))
    check_choice("config: attention_backend", cfg.attention_backend, get_args(AttentionBackend))
    for name in ("norm", "qk_norm", "attn", "mlp", "query_temperature"):
        if given[name] is not LEFT_OUT:
            if PARTS[name] is PartConfig:
                object.__setattr__(cfg, name, by_layer(read_part, given[name]))
            check_kind(f"config: {name}", given[name], PARTS[name])
    for name in ("final_norm", "embed_norm", "act_norm"):
        if given[name] is not LEFT_OUT:
            check_kind(f"config: {name}", given[name], NormConfig, by_layer=False)
    settle_biases(cfg)
    refuse([*_fill_in_parts(cfg), *settle_activation(cfg), *combination_problems(cfg)], "config")


def _fill_in_sizes(cfg: "HookedConfig") -> None:
    given = vars(cfg)
    if given["n_kv_heads"] is None:
        object.__setattr__(cfg, "n_kv_heads", cfg.n_heads)
    if given["d_head"] is None and (latent := find_latent(cfg.attn)) is not None:
        object.__setattr__(cfg, "d_head", latent.d_head)
    elif given["d_head"] is None:
        if cfg.d_model % cfg.n_heads:
            raise ConfigError(f"config: d_model={cfg.d_model} is not a multiple of n_heads={cfg.n_heads}; give d_head")
        object.__setattr__(cfg, "d_head", cfg.d_model // cfg.n_heads)
    if given["d_mlp"] is None:
        object.__setattr__(cfg, "d_mlp", 4 * cfg.d_model)
    if given["d_vocab_out"] is None:
        object.__setattr__(cfg, "d_vocab_out", cfg.d_vocab)


def _fill_in_parts(cfg: "HookedConfig") -> list[str]:
    """Settle what says the same twice, or follows from what was given; what contradicts itself comes back."""
    problems = []
    mlp: Any = cfg.mlp
    final_norm: Any = cfg.final_norm
    attn_only: bool | None = cfg.attn_only
    if mlp is LEFT_OUT:
        mlp = None if attn_only else _MLP
    without_mlps = mlp is None or (isinstance(mlp, tuple) and bool(mlp) and all(one is None for one in mlp))
    if attn_only is not None and attn_only != without_mlps:
        problems.append(f"attn_only={attn_only} and mlp={mlp!r} contradict each other; leave one of the two out")
    if final_norm is LEFT_OUT:
        final_norm = cfg.norm
        if isinstance(cfg.norm, tuple):
            problems.append("norm differs by layer: give final_norm, a NormConfig(...) or None, too")
    object.__setattr__(cfg, "mlp", mlp)
    object.__setattr__(cfg, "attn_only", without_mlps)
    object.__setattr__(cfg, "final_norm", final_norm)
    return problems


def by_layer(change: Callable[[Any], Any], value: Any) -> Any:
    """What a function makes of a value, or of each layer's."""
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)
