"""A part of a network by itself: its weights by name, and the tokens of a call that no network has planned."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.hooks import Call, open_call
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.parts.part import Part
from hooklens.model.plan.positions import TokenPlan
from hooklens.weights.transformer_lens import read_state


def weights_of(part: Part) -> dict[str, Tensor]:
    """The weights of a part and of the parts inside it, under the field's names, which are views of the parameters."""
    return {
        f"{path}.{one.name}".lstrip("."): inner.read_weight(one.name)
        for path, inner in part.named_modules()
        if isinstance(inner, Part)
        for one, _ in inner.weight_table()
    }


@torch.no_grad()
def load_weights(part: Part, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy weights into a part, under the field's names or TransformerLens's, whose biases of 0 may be absent here.

    Args:
        part: the part.
        state: weights; their names begin inside the part.

    Returns:
        Weights that `state` lacks, and names that are no weights of the part.
    """
    at = f"{(part.place or '').replace('{i}', '0')}."
    read = read_state({at + name: value for name, value in state.items()}, part.cfg)
    given, own = {name.removeprefix(at): value for name, value in read.items()}, weights_of(part)
    for name in own.keys() & given:
        own[name].copy_(given[name])
    unknown = [name for name in given if name not in own and (".b_" not in f".{name}" or bool(given[name].any()))]
    return [name for name in own if name not in given], unknown


def plan_alone(
    x: Float[Tensor, "batch pos *axes"],
    cfg: HookedConfig,
    entry: HookedKeyValueCacheEntry | None = None,
    attention_mask: Int[Tensor, "batch key"] | None = None,
) -> tuple[TokenPlan, Call]:
    """The tokens of a call of a part, and who listens to it.

    Args:
        x: what the part reads.
        cfg: the network that the part is of.
        entry: the layer's past keys and values.
        attention_mask: which of past and new columns are tokens; None: all.
    """
    n_past, past, new = 0 if entry is None else len(entry), None, None
    if attention_mask is not None:
        past = attention_mask[:, :n_past].bool() if n_past else None
        new = attention_mask[:, n_past:].bool()
    plan = TokenPlan(
        batch=x.shape[0],
        n_new=x.shape[1],
        device=x.device,
        attention_mask=new,
        past_mask=past,
        n_past=n_past,
        causal=cfg.causal,
    )
    return plan, open_call().on(plan)
