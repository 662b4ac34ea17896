"""Which activations depend on which: the network's wiring as a graph of hook points.

It is written down here a second time, independent of the forward, so that an edit can be held against it:
what lies downstream of the edited point must change, and nothing else may.
"""

from collections.abc import Collection, Iterator
from itertools import pairwise

from hooklens.axes import find_site, layer_of
from hooklens.config import BlockConfig, HookedConfig, MLAConfig, MoEConfig, ShortformerPositions

Edge = tuple[str, str]

# What this module has the wiring of; what a part of another kind does inside is known to itself.
_KNOWN_KINDS = {"attn": ("attention", "mla"), "mlp": ("mlp", "moe")}
_EXITS = {"attn": "ln1_post.hook_scale", "mlp": "ln2_post.hook_scale"}
_LORA = ".hook_lora_out"
# What adapters beside a map add to, in a block and outside of it; and the points that some maps read.
_ADDED_TO = {
    **{f"attn.{letter}_proj": f"attn.hook_{letter}" for letter in "qkv"},
    **{f"attn.{letter}_up_proj": f"attn.hook_{letter}" for letter in "qkv"},
    **{f"attn.{which}_down_proj": f"attn.hook_{which}_latent" for which in ("q", "kv")},
    "attn.k_rope_proj": "attn.hook_k_rope",
    "attn.o_proj": _EXITS["attn"],
    "mlp.in_proj": "mlp.hook_pre",
    "mlp.gate_proj": "mlp.hook_pre",
    "mlp.out_proj": _EXITS["mlp"],
    "mlp.shared.gate_proj": "mlp.shared.hook_pre",
    "mlp.shared.in_proj": "mlp.shared.hook_pre_linear",
    "mlp.shared.out_proj": "mlp.shared.hook_out",
    "mlp.shared.shared_gate_proj": "mlp.shared.hook_gate",
    "embed.table": "embed.ln.hook_scale",
    "embed.proj_in": "embed.ln.hook_scale",
    "unembed.proj_out": "unembed.hook_out",
    "unembed.proj": "unembed.hook_out",
}
_READ_BY = {
    "attn.o_proj": "attn.hook_z",
    "mlp.out_proj": "mlp.hook_post",
    "mlp.shared.out_proj": "mlp.shared.hook_post",
}


def downstream_of(name: str, names: Collection[str], cfg: HookedConfig, *, possibly: bool = False) -> set[str]:
    """The hook points among `names` whose tensors are computed from the one at `name`, which is not among them.

    Args:
        name: the point that is edited.
        names: the points of the model.
        cfg: its configuration.
        possibly: also what may depend on it: inside a part of somebody's own any point may depend on any other, and a
            choice may turn out differently, or as before.
    """
    readers: dict[str, list[str]] = {}
    edges = list(_edges(cfg, names, possibly=possibly))
    for source, reader in (*edges, *_adapter_edges(cfg, names, edges, possibly=possibly)):
        readers.setdefault(source, []).append(reader)
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for reader in readers.get(waiting.pop(), ()):
            if reader not in reached and (possibly or not _is_discrete(reader)):
                reached.add(reader)
                waiting.append(reader)
    return (reached & set(names)) - {name}


def _adapter_edges(
    cfg: HookedConfig, names: Collection[str], edges: Collection[Edge], *, possibly: bool
) -> Iterator[Edge]:
    """Around what adapters add: it reads what the map reads, if one of them acts, and is added to what that gives."""
    for name in names:
        if not name.endswith(_LORA):
            continue
        layer = layer_of(name)
        before = "" if layer is None else f"blocks.{layer}."
        linear = name.removeprefix(before).removesuffix(_LORA)
        added_to = _ADDED_TO.get(linear)
        if added_to is None:
            continue
        if linear == "mlp.in_proj" and cfg.gated_mlp:
            added_to = "mlp.hook_pre_linear"
        # What is far outside of the bounds is the same number behind the clipping, whatever it was.
        if possibly or cfg.clip_qkv is None or added_to != "attn.hook_v":
            yield name, before + added_to
        if possibly and linear in _READ_BY:
            yield before + _READ_BY[linear], name
        elif possibly:
            yield from ((source, name) for source, reader in edges if reader == before + added_to)
            if linear == "unembed.proj" and f"unembed.proj_out{_LORA}" in names:
                yield f"unembed.proj_out{_LORA}", name
            if linear == "embed.proj_in" and f"embed.table{_LORA}" in names:
                yield f"embed.table{_LORA}", name


def _is_discrete(name: str) -> bool:
    site = find_site(name)
    return site is not None and site.discrete


def _edges(cfg: HookedConfig, names: Collection[str], *, possibly: bool) -> Iterator[Edge]:
    """From each tensor to those computed directly from it.

    Points that this architecture does not have are in the graph as well; what would flow through them flows on.
    """
    entrance = "blocks.0.hook_resid_pre" if cfg.n_layers else "ln_final.hook_scale"
    yield from _chain("embed.ln.hook_scale", "embed.ln.hook_normalized", "hook_embed", entrance)
    if isinstance(cfg.positions, ShortformerPositions):
        for layer in range(cfg.n_layers):
            yield from (("hook_pos_embed", f"blocks.{layer}.attn.hook_{letter}") for letter in "qk")
    else:
        yield "hook_pos_embed", entrance
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        for source, reader in _block_edges(cfg, layer, names, possibly=possibly):
            yield block + source, block + reader
        is_last = layer == cfg.n_layers - 1
        yield block + "hook_resid_post", "ln_final.hook_scale" if is_last else f"blocks.{layer + 1}.hook_resid_pre"
    yield from _chain("ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out")


def _block_edges(cfg: HookedConfig, layer: int, names: Collection[str], *, possibly: bool) -> Iterator[Edge]:
    described = cfg.block(layer)
    attention = _attention_edges(described, possibly=possibly)
    edges = (*attention, *_mlp_edges(described), *_stream_edges(cfg))
    for part, config in (("attn", described.attn), ("mlp", described.mlp)):
        if config is None or config.kind in _KNOWN_KINDS[part]:
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


def _attention_edges(block: BlockConfig, *, possibly: bool) -> Iterator[Edge]:
    cfg = block.cfg
    # What is far outside of the bounds is the same number behind the clipping, whatever it was.
    passes = possibly or cfg.clip_qkv is None
    yield from _chain("hook_resid_pre", "hook_attn_in")
    yield from _chain("hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized")
    if isinstance(block.attn, MLAConfig):
        yield from _latent_edges()
    for letter in "qkv":
        yield from _chain("hook_attn_in", f"hook_{letter}_input")
        if letter != "v" or passes:
            yield f"hook_{letter}_input", f"attn.hook_{letter}"
            yield "ln1.hook_normalized", f"attn.hook_{letter}"
    for letter in "qk":
        norm = f"attn.{letter}_norm"
        normed, turned = (f"{norm}.hook_scale", f"{norm}.hook_normalized"), (f"attn.hook_rot_{letter}",)
        before, behind = ((), (*turned, *normed)) if cfg.qk_norm_after_rotary else (normed, turned)
        unclipped = (f"attn.hook_{letter}", *before)
        yield from _chain(*unclipped)
        if passes:
            yield unclipped[-1], behind[0]
        yield from _chain(*behind, "attn.hook_attn_scores")
    yield "attn.hook_k", "attn.hook_k_per_head"
    if passes:
        yield "attn.hook_k_per_head", "attn.hook_attn_scores"
    if 1 not in (block.window, block.chunk) or cfg.attn_sinks:
        # The only weight of a query that sees one key is 1 whatever the score.
        yield "attn.hook_attn_scores", "attn.hook_pattern"
    yield "attn.hook_pattern", "attn.hook_z"
    yield from _chain("attn.hook_v", "attn.hook_v_per_head", "attn.hook_z")
    yield "attn.hook_v", "attn.hook_z"
    yield from _chain("attn.hook_z", "attn.hook_result", "ln1_post.hook_scale", "ln1_post.hook_normalized")
    yield "ln1_post.hook_normalized", "hook_attn_out"


def _latent_edges() -> Iterator[Edge]:
    source = "ln1.hook_normalized"
    for which, letters in (("q", "q"), ("kv", "kv")):
        norm = f"attn.{which}_latent_norm"
        for letter in letters:
            yield from _chain(
                source,
                f"attn.hook_{which}_latent",
                f"{norm}.hook_scale",
                f"{norm}.hook_normalized",
                f"attn.hook_{letter}",
            )
    yield from _chain(source, "attn.hook_k_rope", "attn.hook_k")


def _mlp_edges(block: BlockConfig) -> Iterator[Edge]:
    yield from _chain("hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized")
    for norm in ("ln1", "ln2") if block.cfg.shared_norm else ("ln2",):
        source = f"{norm}.hook_normalized"
        yield from _mixture_edges(source, block.mlp) if isinstance(block.mlp, MoEConfig) else _neuron_edges(source)
    yield from _chain("ln2_post.hook_scale", "ln2_post.hook_normalized", "hook_mlp_out")


def _neuron_edges(source: str) -> Iterator[Edge]:
    for half in ("mlp.hook_pre", "mlp.hook_pre_linear"):
        yield from _chain(source, half, "mlp.hook_mid", "mlp.ln.hook_scale", "mlp.ln.hook_normalized")
    yield from _chain("mlp.ln.hook_normalized", "mlp.hook_post", "ln2_post.hook_scale")


def _mixture_edges(source: str, mixture: MoEConfig) -> Iterator[Edge]:
    router, experts, shared = "mlp.router.", "mlp.experts.", "mlp.shared."
    halves = ("hook_pre", "hook_pre_linear")
    yield from _chain(source, f"{router}hook_logits", f"{router}hook_choice", f"{router}hook_weights")
    if mixture.experts_per_token > 1 or mixture.gate_norm is None:
        # The only gate of a token, divided by itself, is 1 whatever the logits.
        yield f"{router}hook_logits", f"{router}hook_weights"
    for half in halves:
        yield from _chain(source, experts + half, f"{experts}hook_post", f"{experts}hook_result")
        yield f"{router}hook_choice", experts + half
        if mixture.router == "sigmoid_input":
            yield f"{router}hook_weights", experts + half
        yield from _chain(source, shared + half, f"{shared}hook_post", f"{shared}hook_out")
    yield f"{router}hook_weights", f"{experts}hook_result"
    yield from _chain(f"{experts}hook_result", f"{experts}hook_out", "ln2_post.hook_scale")
    yield from _chain(source, f"{shared}hook_gate", f"{shared}hook_out", "ln2_post.hook_scale")


def _stream_edges(cfg: HookedConfig) -> Iterator[Edge]:
    if cfg.wiring == "sequential":
        # Where the stream has no norms, what would flow through theirs flows on.
        for source in ("hook_resid_pre", "hook_attn_out"):
            yield from _chain(source, "ln1_stream.hook_scale", "ln1_stream.hook_normalized", "hook_resid_mid")
        yield "hook_resid_mid", "hook_mlp_in"
        for source in ("hook_resid_mid", "hook_mlp_out"):
            yield from _chain(source, "ln2_stream.hook_scale", "ln2_stream.hook_normalized", "hook_resid_post")
        return
    yield "hook_mlp_out", "hook_resid_post"
    yield from _chain("hook_resid_pre", "hook_mlp_in")
    yield "hook_resid_pre", "hook_resid_post"
    yield "hook_attn_out", "hook_resid_post"


def _chain(*names: str) -> Iterator[Edge]:
    yield from pairwise(names)
