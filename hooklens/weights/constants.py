"""What a config says and weights could say: constants put into the weights, and norms that their weights make no more.

A factor on the embedding (`embed_scale`), the 1 that a norm adds to its weight (`unit_offset`) and rows of a position
table that no position reads are constants of a config. With them in the weights, `W_E` is what enters the stream and a
norm's `w` what it multiplies by, as other libraries and most papers take them. The other way, norms that folding left
with weight 1 and bias 0 can be norms without weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooklens.config import HookedConfig, LearnedPositions, NormConfig, ShortformerPositions
from hooklens.precision import widen

_NORMS = ("norm", "final_norm", "qk_norm", "embed_norm")


class Rewritten(NamedTuple):
    """The same network in other words: parameters by their HookLens names, and their config."""

    state: dict[str, Tensor]
    cfg: HookedConfig


def change_norms(norm: Any, **changes: Any) -> Any:
    """A norm of a config, or a tuple of one for each layer, with fields changed; None stays None."""
    if isinstance(norm, tuple):
        return tuple(change_norms(one, **changes) for one in norm)
    return dataclasses.replace(norm, **changes) if isinstance(norm, NormConfig) else norm


def bake_constants(state: Mapping[str, Tensor], cfg: HookedConfig) -> Rewritten:
    """The constants of the config put into copies of the weights; logits stay as they are but for one rounding.

    A tied unembedding is untied, since the embedding's factor is not on it. The weights are given back as they are
    where the config has no such constants.

    Args:
        state: all parameters of the network under their HookLens names.
        cfg: its config.
    """
    offset = [name for name, norm in cfg.description.norms.items() if norm.unit_offset]
    table = cfg.positions if isinstance(cfg.positions, LearnedPositions | ShortformerPositions) else None
    if cfg.embed_scale is None and not offset and (table is None or not table.offset):
        return Rewritten(dict(state), cfg)
    baked = {name: weight.detach().clone() for name, weight in state.items()}
    for name in offset:
        weight = baked[f"{name}.w"]
        baked[f"{name}.w"] = (1 + widen(weight)).to(weight.dtype)
    if cfg.embed_scale is not None:
        baked["embed.W_E"] *= torch.tensor(cfg.embed_scale, dtype=baked["embed.W_E"].dtype)
    changes: dict[str, Any] = {name: change_norms(getattr(cfg, name), unit_offset=False) for name in _NORMS}
    if table is not None:
        baked["pos_embed.W_pos"] = baked["pos_embed.W_pos"][table.offset :]
        changes["positions"] = dataclasses.replace(table, offset=0)
    plain = cfg.replace(embed_scale=None, embed_scale_rounded=False, tied_unembed=False, origin=None, **changes)
    return Rewritten(baked, plain)


def drop_trivial_norms(state: Mapping[str, Tensor], cfg: HookedConfig) -> Rewritten:
    """The network whose norms have no weights, where all norms of a kind have weight 1 and bias 0.

    The kinds are those of a config: the blocks' (`norm`, with those behind branches), the last (`final_norm`) and that
    of neurons (`act_norm`). Tensors are shared.

    Args:
        state: all parameters of the network under their HookLens names.
        cfg: its config.
    """
    norms = cfg.description.norms
    paths = {
        "norm": [one for one in norms if one.endswith((".ln1", ".ln2", "ln1_post", "ln2_post"))],
        "final_norm": [one for one in norms if one == "ln_final"],
        "act_norm": [one for one in norms if one.endswith("mlp.ln")],
    }
    bare = {
        kind: change_norms(getattr(cfg, kind), weight=False, bias=False, unit_offset=False)
        for kind, places in paths.items()
        if all(
            is_trivial(name, state.get(name), unit_offset=norms[path].unit_offset)
            for path in places
            for name in (f"{path}.w", f"{path}.b")
        )
    }
    plain = cfg.replace(**bare, origin=None)
    return Rewritten({name: one for name, one in state.items() if name in plain.description.weights}, plain)


def is_trivial(name: str, weight: Tensor | None, *, unit_offset: bool = False) -> bool:
    """Whether a norm's `w` multiplies by 1, or its `b` adds 0, everywhere; one that is not there does so, too."""
    nothing = 1 if name.endswith("w") and not unit_offset else 0
    return weight is None or bool((weight == nothing).all())
