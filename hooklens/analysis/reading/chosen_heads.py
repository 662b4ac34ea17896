"""Some of a model's heads, as a caller names them."""

from collections.abc import Mapping, Sequence

from hooklens.arguments import read_int, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice

Heads = Mapping[int, Choice] | Sequence[tuple[int, int]]
"""Heads by layer, `{0: [1, 3], -1: None}`, where None is all of the layer's; or pairs `[(0, 1), (0, 3)]`."""

_EXPECTED = "a mapping from layer to heads, or a list of pairs (layer, head)"


def resolve_heads(model: HookedCausalLM, heads: Heads | None) -> dict[int, list[int]]:
    """The heads by layer, both ascending; None: all.

    Raises:
        InputError: these are no heads, the model lacks some, a layer has no attention, or a head is named twice.
    """
    cfg = model.cfg
    if heads is None:
        return {block.layer: list(range(cfg.n_heads)) for block in cfg.blocks if block.attn is not None}
    found: dict[int, list[int]] = {}
    for layer, chosen in _list_named(heads):
        [place] = resolve_choice(
            read_int(layer, what="heads: a layer"), cfg.n_layers, what="heads: layer", noun="layers"
        )
        if (reason := cfg.description.why_absent(f"blocks.{place}.attn")) is not None:
            raise InputError(f"heads: layer {place} has none: {reason}")
        what = f"heads: layer {place}"
        named = resolve_choice(read_choice(chosen, what=what), cfg.n_heads, what=what, noun="heads")
        if doubled := sorted(set(named) & set(found.get(place, ()))):
            raise InputError(f"{what} names {doubled} more than once; name each head once")
        found[place] = sorted([*found.get(place, ()), *named])
    if not any(found.values()):
        raise InputError("heads: no head is named; expected at least one")
    return {layer: found[layer] for layer in sorted(found) if found[layer]}


def _list_named(heads: object) -> list[tuple[object, object]]:
    """Layers, and what is named in each.

    Raises:
        InputError: something else, or nothing.
    """
    named: list[tuple[object, object]] = []
    if isinstance(heads, Mapping):
        named = list(heads.items())
    elif isinstance(heads, Sequence) and not isinstance(heads, str | bytes):
        for pair in heads:
            if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
                raise refusal(heads, "heads", _EXPECTED, InputError)
            named.append((pair[0], read_int(pair[1], what="heads: a head")))
    if not named:
        raise refusal(heads, "heads", _EXPECTED, InputError)
    return named
