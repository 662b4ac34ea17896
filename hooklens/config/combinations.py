"""Which values of a network's description go together.

Each check says what is wrong in words, and all of them are heard before any is refused.
"""

from typing import TYPE_CHECKING, Any

from hooklens.config.checks import check_counts
from hooklens.config.moe import mixture_problems
from hooklens.config.positions import (
    AlibiPositions,
    LearnedPositions,
    Positions,
    RotaryPositions,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.config.stream import stream_problems

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

# The fields that are tuples where layers differ.
BY_LAYER = (
    "norm_before",
    "norm_after",
    "norm",
    "qk_norm",
    "positions",
    "attn",
    "mlp",
    "windows",
    "chunks",
    "query_temperature",
    "attn_scale",
)


def combination_problems(cfg: "HookedConfig") -> list[str]:
    """What is wrong with values that are each of the right kind, in words."""
    misfits = [
        f"{name} has {len(value)} entries for {cfg.n_layers} layers"
        for name in BY_LAYER
        if isinstance(value := getattr(cfg, name), tuple) and len(value) != cfg.n_layers
    ]
    problems = [*_size_problems(cfg), *stream_problems(cfg), *misfits, *_position_problems(cfg)]
    problems += [*_attention_problems(cfg), *mixture_problems(cfg)]
    # What follows asks layer by layer.
    return problems if misfits else [*problems, *_norm_problems(cfg)]


def _size_problems(cfg: "HookedConfig") -> list[str]:
    problems = []
    if cfg.n_heads % cfg.n_kv_heads:
        problems.append(
            f"n_heads={cfg.n_heads} is not a multiple of n_kv_heads={cfg.n_kv_heads}; "
            "each key-value head serves the same number of query heads"
        )
    for name in ("windows", "chunks"):
        sizes: Any = getattr(cfg, name)
        if not isinstance(sizes, tuple | None):
            problems.append(f"{name}={sizes!r}; expected a tuple with one for each layer, or None")
        elif sizes is not None:
            check_counts(f"config: {name}", {f"layer {i}": size for i, size in enumerate(sizes)})
    return problems


def _norm_problems(cfg: "HookedConfig") -> list[str]:
    problems = []
    # Where all layers are alike, one stands for all: their number may be any that somebody wrote into a file.
    differ = any(isinstance(getattr(cfg, name), tuple) for name in BY_LAYER)
    blocks = [cfg.block(layer) for layer in range(cfg.n_layers if differ else min(1, cfg.n_layers))]
    asked = cfg.norm_after if isinstance(cfg.norm_after, tuple) else (cfg.norm_after,) * len(blocks)
    unsaid = [block.layer for block in blocks if asked[block.layer] and block.norm is None]
    if unsaid:
        where = f"layers {unsaid}" if differ else "every layer"
        problems.append(f"norm_after asks for norms in {where}, where norm is None")
    if cfg.shared_norm and (cfg.wiring != "parallel" or not all(block.norm_before for block in blocks)):
        problems.append("shared_norm needs wiring='parallel', and norm_before=True with a norm in every layer")
    return problems


def _attends(cfg: "HookedConfig") -> bool:
    """Whether any layer has attention."""
    given: Any = cfg.attn
    return cfg.n_layers > 0 and any(one is not None for one in (given if isinstance(given, tuple) else (given,)))


def _attention_problems(cfg: "HookedConfig") -> list[str]:
    problems = []
    unread = [
        f"{name}={value!r}"
        for name, value, default in (
            ("qk_norm_over", cfg.qk_norm_over, "head"),
            ("qk_norm_per_head", cfg.qk_norm_per_head, False),
            ("qk_norm_after_rotary", cfg.qk_norm_after_rotary, False),
        )
        if value != default
    ]
    # Some layers of a network may be those without.
    if unread and cfg.qk_norm is None:
        problems.append(f"{', '.join(unread)} says how queries and keys are normed, and qk_norm is None")
    if cfg.qk_norm_per_head and cfg.qk_norm_over == "all_heads":
        problems.append("qk_norm_per_head: a norm over all heads has a weight for each head as it is; leave it out")
    if cfg.attention_backend == "sdpa":
        problems += [
            f"attention_backend='sdpa': scaled_dot_product_attention has no {what}; take 'auto', 'explicit' or 'flex'"
            for what, asked in (
                (f"soft cap (attn_softcap={cfg.attn_softcap})", cfg.attn_softcap is not None),
                ("sinks (attn_sinks=True)", cfg.attn_sinks),
            )
            if asked
        ]
    if isinstance(cfg.windows, tuple) and isinstance(cfg.chunks, tuple):
        both = [i for i, pair in enumerate(zip(cfg.windows, cfg.chunks, strict=False)) if None not in pair]
        if both:
            problems.append(f"layers {both} have a window and a chunk; a layer has one of the two")
    return problems


def _position_problems(cfg: "HookedConfig") -> list[str]:
    given: Any = cfg.positions
    several = isinstance(given, tuple)
    problems = []
    for one in given if several else (given,):
        if not isinstance(one, Positions):
            problems.append(
                f"positions={one!r}; expected RotaryPositions(...), AlibiPositions(), LearnedPositions(), "
                "ShortformerPositions(), SinusoidalPositions(), or NoPositions() for none at all"
            )
        if several and isinstance(one, LearnedPositions | SinusoidalPositions):
            problem = "learned" if isinstance(one, LearnedPositions) else "sinusoidal"
            problems.append(f"{problem} positions enter below the blocks, so they cannot differ by layer")
        if several and isinstance(one, ShortformerPositions):
            problems.append("shortformer positions are one table for all layers, so they cannot differ by layer")
        elif isinstance(one, ShortformerPositions) and not _attends(cfg):
            problems.append(
                "shortformer positions are added to queries and keys, and no layer has attention; give NoPositions()"
            )
        if isinstance(one, SinusoidalPositions) and (cfg.d_model % 2 or (one.includes_base and cfg.d_model < 4)):
            problems.append(f"sinusoidal positions come in pairs: d_model={cfg.d_model} is not even, or too small")
        if isinstance(one, AlibiPositions) and not cfg.causal:
            problems.append(
                "linear biases with causal=False: they are defined for keys that stand before the query "
                "(Press et al. 2022); give other positions"
            )
        if isinstance(one, RotaryPositions) and one.dim > cfg.d_head:
            problems.append(f"rotary dim {one.dim} is larger than d_head={cfg.d_head}")
    return list(dict.fromkeys(problems))
