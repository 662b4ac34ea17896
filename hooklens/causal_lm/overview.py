"""What a model shows of itself: sizes, where it lies, and its parts, with equal blocks as one.

All is read from the configuration and from the parameters' shapes; no weight is looked at.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hooklens.display import (
    Child,
    Element,
    Listing,
    Summary,
    fold,
    format_bytes,
    format_count,
    format_shape,
    layer_of_name,
    merge_layers,
    table,
)
from hooklens.weights.offloaded import is_offloaded, lies_on_disk

if TYPE_CHECKING:
    from hooklens.causal_lm.model import HookedCausalLM

Named: TypeAlias = tuple[str, str, tuple[int, ...]]
"""The last word of a weight's name, its axes, and its shape."""

Site: TypeAlias = tuple[str, str, bool]
"""The last word of a hook point's name, its axes, and whether it is on request."""

Contents: TypeAlias = tuple[tuple[Named, ...], tuple[Site, ...]]
"""The weights and hook points that stand directly in a part."""

_TREE = "model.hook_table(): all hook points; torch.nn.Module.__repr__(model): torch's tree of modules"


def summarise(model: "HookedCausalLM") -> Summary:
    """What there is to see of a model."""
    cfg = model.cfg
    parts = _find_parts(model)
    merged = merge_layers(parts.items())
    rows = [
        (
            name or "model",
            " ".join(word for word, _, _ in weights),
            _count(weights, n, tied=_is_tied(model, name)),
            _tell(sites, n),
        )
        for name, (weights, sites), n in merged
    ]
    family = "" if cfg.origin is None else f" ({cfg.origin.family})"
    return Summary(
        title=f"{type(model).__name__}{family}: {cfg.n_layers} blocks, {format_count(model.n_params_total)} parameters",
        facts={
            "sizes": ", ".join(f"{name} {getattr(cfg, name):,}" for name in _choose_sizes(model)),
            "weights": _tell_weights(model),
            "tokenizer": _tell_tokenizer(model),
            "transforms": ", ".join(model.transforms) or None,
            "adapters": _tell_adapters(model),
            "hooks": _tell_hooks(model),
            "mode": "training" if model.training else None,
        },
        listing=Listing(
            columns=("part", "weights", "parameters", "hook points (in brackets: on request)"),
            rows=rows,
            what="kinds of parts",
            caption="parts",
            more="model.hook_table() has all hook points",
            on_pages=False,
        ),
        notes=[_TREE],
        pages=[partial(_fold_parts, model, parts)],
    )


def _find_parts(model: "HookedCausalLM") -> dict[str, Contents]:
    """By name of the part what stands in it, in the order of the computation."""
    description = model.cfg.description
    weights: dict[str, list[Named]] = {}
    sites: dict[str, list[Site]] = {}
    for name, weight in description.weights.items():
        part, _, word = name.rpartition(".")
        weights.setdefault(part, []).append((word, " ".join(weight.axes), weight.shape))
    for name, site in description.points.items():
        part, _, word = name.rpartition(".")
        sites.setdefault(part, []).append((word, " ".join(site.axes), site.on_request))
    names = sorted({*weights, *sites}, key=partial(_order, {name: place for place, name in enumerate(weights)}))
    return {name: (tuple(weights.get(name, ())), tuple(sites.get(name, ()))) for name in names}


def _order(places: Mapping[str, int], name: str) -> tuple[float, ...]:
    """Where a part stands: what is before the blocks, the blocks, each before its parts, and what is behind them."""
    layer = layer_of_name(name)
    if layer is not None:
        return 1, layer, places.get(name, -1) if name.count(".") > 1 else -2
    is_behind = name.startswith(("ln_final", "unembed"))
    return 2 if is_behind else 0, 0, places.get(name, -1)


def _choose_sizes(model: "HookedCausalLM") -> Sequence[str]:
    cfg = model.cfg
    names = ["d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"]
    if cfg.n_kv_heads != cfg.n_heads:
        names.insert(2, "n_kv_heads")
    return [*names, "d_vocab_out"] if cfg.d_vocab_out != cfg.d_vocab else names


def _count(weights: Sequence[Named], n: int, *, tied: bool) -> str:
    if tied:
        return "tied"
    total = sum(math.prod(shape) for _, _, shape in weights)
    if not total:
        return ""
    return format_count(total) if n == 1 else f"{n} x {format_count(total)}"


def _is_tied(model: "HookedCausalLM", name: str) -> bool:
    return name == "unembed" and model.cfg.tied_unembed and not model.cfg.unembed_bias


def _tell(sites: Sequence[Site], n: int) -> str:
    """How many points there are, and their names, those on request in brackets."""
    words = [f"({word})" if on_request else word for word, _, on_request in sites]
    short = [word.replace("hook_", "", 1) for word in words]
    each = f"{len(sites)}" if n == 1 else f"{n} x {len(sites)}"
    return f"{each}: {' '.join(short)}" if words else ""


def _tell_weights(model: "HookedCausalLM") -> str:
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    dtypes = dict.fromkeys(str(one.dtype).removeprefix("torch.") for one in model.parameters())
    devices = dict.fromkeys(str(one.device) for one in model.parameters())
    size = sum(tensor.nbytes for tensor in kept)
    where = "without values (meta)" if list(devices) == ["meta"] else f"on {', '.join(devices)}"
    beside = {
        "on the disk": sum(one.nbytes for one in kept if lies_on_disk(one)),
        "on the CPU for other devices": sum(one.nbytes for one in kept if is_offloaded(one) and not lies_on_disk(one)),
    }
    told = "".join(f", {format_bytes(n)} of them {words}" for words, n in beside.items() if n)
    return f"{', '.join(dtypes)}, {format_bytes(size)} {where}{told}"


def _tell_tokenizer(model: "HookedCausalLM") -> str:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return "none"
    name = str(getattr(tokenizer, "name_or_path", ""))
    # A folder is told by its last word: where it lies on this machine says nothing of the model.
    name = Path(name).name if Path(name).is_absolute() else name
    return type(tokenizer).__name__ + (f" of {name}" if name else "")


def _tell_adapters(model: "HookedCausalLM") -> str | None:
    active = model.active_adapters
    return ", ".join(f"{name}{'' if name in active else ' (not active)'}" for name in model.adapters) or None


def _tell_hooks(model: "HookedCausalLM") -> str | None:
    attached = merge_layers((name, len(several)) for name, several in model.list_hooks().items())
    return ", ".join(f"{n} at {name}" for name, n, _ in attached) or None


def _fold_parts(model: "HookedCausalLM", parts: Mapping[str, Contents]) -> list[Child]:
    """The tree: parts outside the blocks, and the blocks, equal ones as one."""
    layers: dict[int, list[tuple[str, Contents]]] = {}
    for name, contents in parts.items():
        if (layer := layer_of_name(name)) is not None:
            layers.setdefault(layer, []).append((name.removeprefix(f"blocks.{layer}").lstrip("."), contents))
    blocks = merge_layers((f"blocks.{layer}", tuple(inner)) for layer, inner in layers.items())
    outside = [(name, contents) for name, contents in parts.items() if layer_of_name(name) is None]
    n_before = sum(not name.startswith(("ln_final", "unembed")) for name, _ in outside)
    tree: list[Child] = [_fold_part(model, name or "model", contents) for name, contents in outside[:n_before]]
    for name, inner, n in blocks:
        total = sum(math.prod(shape) for _, (weights, _) in inner for _, _, shape in weights)
        title = f"{name}: {f'{n} equal blocks of ' if n > 1 else ''}{format_count(total)} parameters"
        tree.append(fold(title, (_fold_part(model, part or "block", contents) for part, contents in inner)))
    return [*tree, (_fold_part(model, name, contents) for name, contents in outside[n_before:])]


def _fold_part(model: "HookedCausalLM", name: str, contents: Contents) -> Element:
    weights, sites = contents
    count = _count(weights, 1, tied=_is_tied(model, name))
    rows = [
        *((word, "weight", axes, format_shape(shape), "") for word, axes, shape in weights),
        *((word, "hook point", axes, "", "on request" if asked else "") for word, axes, asked in sites),
    ]
    listed = table(("name", "kind", "axes", "shape", ""), rows, caption=f"weights and hook points of {name}")
    told = ", ".join([count] * bool(count) + [f"{len(sites)} hook points"] * bool(sites))
    return fold(f"{name}: {told}", listed)
