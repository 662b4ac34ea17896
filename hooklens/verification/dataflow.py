"""Which activations depend on which: the network's wiring as a graph of hook points.

It is written down here a second time, independent of the forward, so that an edit can be held against it:
what lies downstream of the edited point must change, and nothing else may.
"""

from collections.abc import Collection, Iterator
from itertools import pairwise

from hooklens.config import HookedConfig

Edge = tuple[str, str]

# What this module has the wiring of; what a part of another kind does inside is known to itself.
_KNOWN_KINDS = {"attn": "attention", "mlp": "mlp"}
_EXITS = {"attn": "ln1_post.hook_scale", "mlp": "ln2_post.hook_scale"}


def downstream_of(name: str, names: Collection[str], cfg: HookedConfig, *, possibly: bool = False) -> set[str]:
    """The hook points among `names` whose tensors are computed from the one at `name`, which is not among them.

    Args:
        name: the point that is edited.
        names: the points of the model.
        cfg: its configuration.
        possibly: also what may depend on it: inside a part of somebody's own any point may depend on any other.
    """
    readers: dict[str, list[str]] = {}
    for source, reader in _edges(cfg, names, possibly=possibly):
        readers.setdefault(source, []).append(reader)
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for reader in readers.get(waiting.pop(), ()):
            if reader not in reached:
                reached.add(reader)
                waiting.append(reader)
    return (reached & set(names)) - {name}


def _edges(cfg: HookedConfig, names: Collection[str], *, possibly: bool) -> Iterator[Edge]:
    """From each tensor to those computed directly from it.

    Points that this architecture does not have are in the graph as well; what would flow through them flows on.
    """
    entrance = "blocks.0.hook_resid_pre" if cfg.n_layers else "ln_final.hook_scale"
    yield "hook_embed", entrance
    yield "hook_pos_embed", entrance
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        for source, reader in _block_edges(cfg, layer, names, possibly=possibly):
            yield block + source, block + reader
        is_last = layer == cfg.n_layers - 1
        yield block + "hook_resid_post", "ln_final.hook_scale" if is_last else f"blocks.{layer + 1}.hook_resid_pre"
    yield from _chain("ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out")


def _block_edges(cfg: HookedConfig, layer: int, names: Collection[str], *, possibly: bool) -> Iterator[Edge]:
    edges = (*_attention_edges(), *_mlp_edges(), *_stream_edges(cfg))
    described = cfg.block(layer)
    for part, config in (("attn", described.attn), ("mlp", described.mlp)):
        if config is None or config.kind == _KNOWN_KINDS[part]:
            continue
        before = f"blocks.{layer}."
        inside = [one.removeprefix(before) for one in names if one.startswith(f"{before}{part}.")]
        edges = tuple(_around(part, inside, edges, possibly=possibly))
    yield from edges


def _around(part: str, inside: Collection[str], edges: Collection[Edge], *, possibly: bool) -> Iterator[Edge]:
    """The edges of a layer with a part of somebody's own: of what is in it, only what enters and what leaves it."""
    entering = {
        source for source, reader in edges if reader.startswith(f"{part}.") and not source.startswith(f"{part}.")
    }
    for edge in edges:
        if not any(name.startswith(f"{part}.") for name in edge):
            yield edge
    for source in entering:
        # The part may leave one of its inputs out; what its norm gives it reads.
        if possibly or source.endswith("hook_normalized"):
            yield source, _EXITS[part]
        if possibly:
            yield from ((source, one) for one in inside)
    if possibly:
        yield from ((one, other) for one in inside for other in (*inside, _EXITS[part]) if one != other)


def _attention_edges() -> Iterator[Edge]:
    yield from _chain("hook_resid_pre", "hook_attn_in")
    yield from _chain("hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized")
    for letter in "qkv":
        yield from _chain("hook_attn_in", f"hook_{letter}_input", f"attn.hook_{letter}")
        yield "ln1.hook_normalized", f"attn.hook_{letter}"
    for letter in "qk":
        norm = f"attn.{letter}_norm"
        yield from _chain(f"attn.hook_{letter}", f"{norm}.hook_scale", f"{norm}.hook_normalized")
        yield from _chain(f"{norm}.hook_normalized", f"attn.hook_rot_{letter}", "attn.hook_attn_scores")
    yield from _chain("attn.hook_k", "attn.hook_k_per_head", "attn.hook_attn_scores")
    yield from _chain("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z")
    yield from _chain("attn.hook_v", "attn.hook_v_per_head", "attn.hook_z")
    yield "attn.hook_v", "attn.hook_z"
    yield from _chain("attn.hook_z", "attn.hook_result", "ln1_post.hook_scale", "ln1_post.hook_normalized")
    yield "ln1_post.hook_normalized", "hook_attn_out"


def _mlp_edges() -> Iterator[Edge]:
    yield from _chain("hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized")
    for half in ("mlp.hook_pre", "mlp.hook_pre_linear"):
        yield from _chain("ln2.hook_normalized", half, "mlp.hook_post")
    yield from _chain("mlp.hook_post", "ln2_post.hook_scale", "ln2_post.hook_normalized", "hook_mlp_out")


def _stream_edges(cfg: HookedConfig) -> Iterator[Edge]:
    yield "hook_mlp_out", "hook_resid_post"
    if cfg.wiring == "sequential":
        for source in ("hook_resid_pre", "hook_attn_out"):
            yield source, "hook_resid_mid"
        for reader in ("hook_mlp_in", "hook_resid_post"):
            yield "hook_resid_mid", reader
        return
    yield from _chain("hook_resid_pre", "hook_mlp_in")
    yield "hook_resid_pre", "hook_resid_post"
    yield "hook_attn_out", "hook_resid_post"
    if cfg.shared_norm:
        yield "ln1.hook_normalized", "mlp.hook_pre"
        yield "ln1.hook_normalized", "mlp.hook_pre_linear"


def _chain(*names: str) -> Iterator[Edge]:
    yield from pairwise(names)
