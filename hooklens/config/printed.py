"""A configuration as text: what differs from what a network has when nothing is said, in groups."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hooklens.config.activations import SWIGLU_ALPHA, SWIGLU_LIMIT
from hooklens.config.block import PartConfig
from hooklens.config.norms import NormConfig
from hooklens.display import MOST_COLUMNS, Element, Summary, clip, fold, shorten, table

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

GROUPS: Mapping[str, tuple[str, ...]] = {
    "sizes": ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "n_ctx"),
    "vocabulary": (
        "d_vocab",
        "d_vocab_out",
        "d_embed",
        "tied_unembed",
        "unembed_bias",
        "logits_softcap",
        "logits_scale",
    ),
    "stream": (
        *("wiring", "shared_norm", "embed_scale", "embed_scale_rounded", "residual_scale"),
        *("embed_dropout", "resid_dropout"),
    ),
    "norms": ("norm", "norm_before", "norm_after", "norm_stream", "final_norm", "embed_norm"),
    "attention": (
        *("attn", "causal", "windows", "chunks", "document_mask", "qkv_bias", "q_bias", "k_bias", "v_bias", "out_bias"),
        *("attn_scale", "attn_softcap", "attn_sinks", "clip_qkv", "query_temperature", "qk_norm", "qk_norm_over"),
        *("qk_norm_per_head", "qk_norm_after_rotary", "attn_dropout", "attention_backend"),
    ),
    "positions": ("positions",),
    "MLP": (
        *("mlp", "attn_only", "act_fn", "act_norm", "swiglu_limit", "swiglu_alpha", "gated_mlp"),
        *("mlp_bias", "mlp_in_bias", "mlp_gate_bias", "mlp_out_bias"),
    ),
    "fresh weights": ("init_std", "init_scheme"),
}
"""The fields that are printed, by what they are about."""

_MOST_LETTERS = 400
_INDENT = "    "
_SIZES = ("d_model", "n_layers", "n_heads", "d_vocab", "n_ctx")


def print_config(cfg: "HookedConfig") -> str:
    """The call that makes the configuration, a line or more for each group; at most twenty lines.

    An ellipsis stands where something is left out, and a last line then says so.
    """
    given = _find_given(cfg)
    lines = [f"{type(cfg).__name__}("]
    for names in GROUPS.values():
        entries = [f"{name}={print_value(given[name])}," for name in names if name in given]
        lines += _fill(entries, MOST_COLUMNS - len(_INDENT))
    text = shorten([*lines, ")"], more="cfg.to_dict() has all")
    return text if "\N{HORIZONTAL ELLIPSIS}" not in text else shorten([*lines, ")  # cfg.to_dict() has all"])


def summarise(cfg: "HookedConfig") -> Summary:
    """What a page shows: the groups, and all fields folded."""
    given = _find_given(cfg)
    family = "" if cfg.origin is None else f", read from a checkpoint of the family {cfg.origin.family}"
    return Summary(
        title=f"{type(cfg).__name__} of {cfg.n_layers} layers, d_model {cfg.d_model}{family}",
        facts={
            group: ", ".join(f"{name}={print_value(given[name])}" for name in names if name in given) or None
            for group, names in GROUPS.items()
        },
        notes=["what is not named is as in a HookedConfig of these sizes with nothing else given"],
        pages=[partial(_fold_fields, cfg, given)],
    )


def _fold_fields(cfg: "HookedConfig", given: Mapping[str, Any]) -> Element:
    rows = [
        (group, name, clip(print_value(getattr(cfg, name)), 120), name in given)
        for group, names in GROUPS.items()
        for name in names
    ]
    return fold("all fields", table(("group", "field", "value", "given"), rows, caption="all fields"))


def _find_given(cfg: "HookedConfig") -> dict[str, Any]:
    """The fields that do not follow from the others, nor are as they are left out."""
    derived: dict[str, Any] = {
        "n_kv_heads": cfg.n_heads,
        "d_head": cfg.d_model // cfg.n_heads,
        "d_mlp": 4 * cfg.d_model,
        "d_vocab_out": cfg.d_vocab,
        "final_norm": cfg.norm,
        "mlp": None if cfg.attn_only else PartConfig(kind="mlp"),
        # A tuple of layers without MLPs says so itself.
        "attn_only": cfg.mlp is not None and cfg.attn_only,
        "swiglu_limit": SWIGLU_LIMIT if cfg.act_fn == "clamped_swiglu" else None,
        "swiglu_alpha": SWIGLU_ALPHA if cfg.act_fn == "clamped_swiglu" else None,
    }
    if cfg.act_fn == "solu_ln":
        own = cfg.norm if isinstance(cfg.norm, NormConfig) and cfg.norm.kind == "layer" else None
        derived["act_norm"] = own or NormConfig(kind="layer", eps=1e-5)
    given = {}
    for spec in dataclasses.fields(cfg):
        value = getattr(cfg, spec.name)
        usual = derived.get(spec.name, spec.default)
        # True is equal to 1, and what a field holds is told by its kind as well.
        if spec.repr and (spec.name in _SIZES or type(value) is not type(usual) or value != usual):
            given[spec.name] = value
    return given


def print_value(value: object) -> str:
    """A value of a field as code that makes it: dataclasses without what is left out, tuples by what they repeat."""
    if isinstance(value, tuple) and len(value) > 1:
        return _print_layers([print_value(one) for one in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            f"{spec.name}={print_value(getattr(value, spec.name))}"
            for spec in dataclasses.fields(value)
            if spec.init and spec.repr and not _is_default(spec, getattr(value, spec.name))
        ]
        return f"{type(value).__name__}({', '.join(fields)})"
    return repr(value)


def _is_default(spec: dataclasses.Field[Any], value: object) -> bool:
    if spec.default_factory is not dataclasses.MISSING:
        return bool(value == spec.default_factory())
    return spec.default is not dataclasses.MISSING and type(value) is type(spec.default) and value == spec.default


def _print_layers(printed: Sequence[str]) -> str:
    """A value for each layer: `(512, None) * 8`, or `(None,) * 3 + (512,)`, whichever is shorter."""
    n = len(printed)
    period = next(
        size for size in range(1, n + 1) if n % size == 0 and list(printed[:size]) * (n // size) == list(printed)
    )
    repeated = _print_tuple(printed[:period]) + (f" * {n // period}" if period < n else "")
    runs = [(one, len(list(group))) for one, group in groupby(printed)]
    joined = " + ".join(_print_tuple([one]) + (f" * {size}" if size > 1 else "") for one, size in runs)
    return min(repeated, joined, key=len)


def _print_tuple(printed: Sequence[str]) -> str:
    return f"({', '.join(printed)}{',' if len(printed) == 1 else ''})"


def _fill(entries: Sequence[str], width: int) -> list[str]:
    """Entries in lines, as many as fit in each; a long one in lines of its own."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + 1 + len(entry) <= width:
            lines[-1] += f" {entry}"
        elif len(entry) <= width:
            lines.append(entry)
        else:
            lines += textwrap.wrap(clip(entry, _MOST_LETTERS), width, subsequent_indent=_INDENT)
    return [_INDENT + line for line in lines]
