"""The glossary: axis names, the hook points there can be, and how a hook point is named.

Every other module takes its words from here. Sizes are `d_model d_head d_mlp d_vocab n_layers n_heads
n_kv_heads n_ctx`; axes are the keys of `AXES`. With a key-value cache `pos` and `query` are the new
tokens and `key` is past + new tokens.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from hooklens.errors import HookNameError, suggest_names

AXES: dict[str, str] = {
    "batch": "rows of the batch",
    "pos": "token positions run in this call",
    "query": "token positions that attend (the same positions as pos)",
    "key": "token positions attended to: past + new",
    "head": "query heads",
    "kv_head": "key-value heads; fewer than heads in grouped-query and multi-query attention",
    "d_model": "width of the residual stream",
    "d_head": "width of one attention head",
    "d_mlp": "neurons of one MLP",
    "d_vocab": "entries of the vocabulary",
    "one": "a single number per position",
}


@dataclass(frozen=True, kw_only=True)
class HookSite:
    """What the hook points of one kind carry.

    Attributes:
        template: the hook name with `{i}` in the place of the layer.
        axes: the axes of the tensor, names from `AXES`.
        description: what the tensor is, in one line.
        on_request: expensive, so left out of "cache everything"; naming the point asks for it.
        repeats: the template of the point whose key-value heads this one repeats for each query head that reads
            them. An edit of such a copy is in no key-value cache, which holds one key and value per key-value head.
    """

    template: str
    axes: tuple[str, ...]
    description: str
    on_request: bool = False
    repeats: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the point exists once per block."""
        return "{i}" in self.template


_STREAM = ("batch", "pos", "d_model")
_STREAM_SCALE = ("batch", "pos", "one")
_PER_HEAD = ("batch", "pos", "head", "d_head")
_PER_KV_HEAD = ("batch", "pos", "kv_head", "d_head")
_PER_NEURON = ("batch", "pos", "d_mlp")
_HEAD_STREAM = ("batch", "pos", "head", "d_model")
_KV_HEAD_STREAM = ("batch", "pos", "kv_head", "d_model")
_ATTENTION = ("batch", "head", "query", "key")


def _norm_sites(
    prefix: str, where: str, *, axes: tuple[str, ...] = _STREAM, scale_axes: tuple[str, ...] = _STREAM_SCALE
) -> list[HookSite]:
    return [
        HookSite(template=f"{prefix}.hook_scale", axes=scale_axes, description=f"{where}: the norm's denominator"),
        HookSite(
            template=f"{prefix}.hook_normalized",
            axes=axes,
            description=f"{where}: after centring and scaling, before weight and bias",
        ),
    ]


def _all_sites() -> list[HookSite]:
    """List every kind of hook point in the order in which a forward reaches them."""
    block, attn, mlp = "blocks.{i}", "blocks.{i}.attn", "blocks.{i}.mlp"
    return [
        HookSite(template="hook_embed", axes=_STREAM, description="token embedding, as it enters the stream"),
        HookSite(template="hook_pos_embed", axes=_STREAM, description="learned position embedding"),
        HookSite(template=f"{block}.hook_resid_pre", axes=_STREAM, description="the stream entering the block"),
        HookSite(
            template=f"{block}.hook_attn_in",
            axes=_HEAD_STREAM,
            on_request=True,
            description="stream entering attention, a copy per head, before the norm; a key-value head reads "
            "the mean of the copies of its query heads",
        ),
        HookSite(
            template=f"{block}.hook_q_input",
            axes=_HEAD_STREAM,
            on_request=True,
            description="stream entering the queries, a copy per head, before the norm",
        ),
        HookSite(
            template=f"{block}.hook_k_input",
            axes=_KV_HEAD_STREAM,
            on_request=True,
            description="stream entering the keys, a copy per key-value head, before the norm",
        ),
        HookSite(
            template=f"{block}.hook_v_input",
            axes=_KV_HEAD_STREAM,
            on_request=True,
            description="stream entering the values, a copy per key-value head, before the norm",
        ),
        *_norm_sites(f"{block}.ln1", "norm before attention"),
        HookSite(template=f"{attn}.hook_q", axes=_PER_HEAD, description="queries, before query-key norm and rotary"),
        HookSite(template=f"{attn}.hook_k", axes=_PER_KV_HEAD, description="keys, before query-key norm and rotary"),
        HookSite(template=f"{attn}.hook_v", axes=_PER_KV_HEAD, description="values"),
        HookSite(
            template=f"{attn}.hook_k_per_head",
            axes=_PER_HEAD,
            on_request=True,
            repeats=f"{attn}.hook_k",
            description="grouped queries: keys before query-key norm and rotary, a copy per query head",
        ),
        HookSite(
            template=f"{attn}.hook_v_per_head",
            axes=_PER_HEAD,
            on_request=True,
            repeats=f"{attn}.hook_v",
            description="grouped queries: values, a copy per query head",
        ),
        *_norm_sites(f"{attn}.q_norm", "query norm", axes=_PER_HEAD, scale_axes=("batch", "pos", "head", "one")),
        *_norm_sites(f"{attn}.k_norm", "key norm", axes=_PER_KV_HEAD, scale_axes=("batch", "pos", "kv_head", "one")),
        HookSite(template=f"{attn}.hook_rot_q", axes=_PER_HEAD, description="queries after rotary"),
        HookSite(template=f"{attn}.hook_rot_k", axes=_PER_KV_HEAD, description="keys after rotary, as cached"),
        HookSite(
            template=f"{attn}.hook_attn_scores",
            axes=_ATTENTION,
            description="scaled, soft-capped and biased scores before the softmax; masked entries are -inf",
        ),
        HookSite(
            template=f"{attn}.hook_pattern",
            axes=_ATTENTION,
            description="attention pattern; rows sum to 1, fully masked rows are 0",
        ),
        HookSite(template=f"{attn}.hook_z", axes=_PER_HEAD, description="pattern-weighted values"),
        HookSite(
            template=f"{attn}.hook_result",
            axes=_HEAD_STREAM,
            on_request=True,
            description="what each head writes (z W_O); with b_O they sum to the attention output",
        ),
        *_norm_sites(f"{block}.ln1_post", "norm after attention"),
        HookSite(template=f"{block}.hook_attn_out", axes=_STREAM, description="what attention adds to the stream"),
        HookSite(template=f"{block}.hook_resid_mid", axes=_STREAM, description="the stream between attention and MLP"),
        HookSite(
            template=f"{block}.hook_mlp_in",
            axes=_STREAM,
            description="stream entering the MLP, before the norm; an edit reaches the MLP only",
        ),
        *_norm_sites(f"{block}.ln2", "norm before the MLP"),
        HookSite(template=f"{mlp}.hook_pre", axes=_PER_NEURON, description="before the activation; gated: the gate"),
        HookSite(template=f"{mlp}.hook_pre_linear", axes=_PER_NEURON, description="gated MLP: the linear half"),
        HookSite(template=f"{mlp}.hook_post", axes=_PER_NEURON, description="neurons: the input of W_out"),
        *_norm_sites(f"{block}.ln2_post", "norm after the MLP"),
        HookSite(template=f"{block}.hook_mlp_out", axes=_STREAM, description="what the MLP adds to the stream"),
        HookSite(template=f"{block}.hook_resid_post", axes=_STREAM, description="the stream leaving the block"),
        *_norm_sites("ln_final", "final norm"),
        HookSite(template="unembed.hook_in", axes=_STREAM, description="input of the unembedding"),
        HookSite(
            template="unembed.hook_out",
            axes=("batch", "pos", "d_vocab"),
            description="logits, before an output soft cap",
        ),
    ]


HOOK_SITES: dict[str, HookSite] = {site.template: site for site in _all_sites()}
_REPEATS = {site.repeats: site.template for site in HOOK_SITES.values() if site.repeats is not None}

_LAYER = re.compile(r"^blocks\.(\d+)\.")


def find_site(name: str) -> HookSite | None:
    """The kind of hook point that `name` is one of; None for points outside the transformer's grammar."""
    return HOOK_SITES.get(_LAYER.sub("blocks.{i}.", name))


def name_repeats(name: str) -> str | None:
    """The point that repeats the key-value heads at `name` for each query head; None where there is none.

    `"blocks.3.attn.hook_k"` gives `"blocks.3.attn.hook_k_per_head"`. Models have it where query heads share keys.
    """
    match = _LAYER.match(name)
    template = _REPEATS.get(_LAYER.sub("blocks.{i}.", name))
    return template if template is None or match is None else template.replace("{i}", match.group(1))


def layer_of(name: str) -> int | None:
    """The layer in a hook name: `"blocks.3.hook_resid_pre"` gives 3, `"hook_embed"` gives None."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


# Words of the field that stand for a hook point's own word.
ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_SHORTHAND = re.compile(r"^(?P<word>[a-z_]+?)(?P<layer>-?\d+)(?P<part>[a-z_0-9]*)$")


@lru_cache(maxsize=1)
def _templates_by_word() -> dict[tuple[str, str | None], str]:
    """Index templates by (short word, part), where part is the module the point sits in, if ambiguous."""
    index: dict[tuple[str, str | None], str] = {}
    for template in HOOK_SITES:
        *path, point = template.split(".")
        word = point.removeprefix("hook_")
        index[word, path[-1] if path else None] = template
    plain: dict[str, list[str]] = {}
    for (word, _), template in index.items():
        plain.setdefault(word, []).append(template)
    for word, templates in plain.items():
        if len(templates) == 1:
            index[word, None] = templates[0]
    return index


def get_act_name(name: str, layer: int | None = None, part: str | None = None, *, n_layers: int | None = None) -> str:
    """The full hook name of a shorthand.

    `("resid_pre", 3)` gives `"blocks.3.hook_resid_pre"`; `("scale", 3, "ln1")` gives
    `"blocks.3.ln1.hook_scale"`; `("k3")` gives `"blocks.3.attn.hook_k"`; `("scale")` without a layer is the
    final norm's. A full name comes back as it is.

    Args:
        name: a full hook name, a shorthand, or one of the field's aliases (`"attn"` is the pattern).
        layer: the block; may also stand inside `name` (`"k3"`). Negative ones need `n_layers`.
        part: the module, where the word alone is ambiguous: `"ln1"`, `"ln2"`, `"q_norm"`, ...
        n_layers: number of blocks, used to check `layer` and to count negative ones from the end.

    Raises:
        HookNameError: no hook point has that name, or a layer or part is missing or too much.
    """
    if layer is None and part is None and find_site(name) is not None:
        return name
    word, given_layer, given_part = name, layer, part
    if layer is None and (match := _SHORTHAND.match(name)):
        word, given_layer = match["word"], int(match["layer"])
        given_part = match["part"] or part
    word = ALIASES.get(word, word)

    index = _templates_by_word()
    if word in {"scale", "normalized"} and given_part is None and given_layer is None:
        given_part = "ln_final"
    template = index.get((word, given_part))
    if template is None:
        parts = sorted(part_name for (known, part_name) in index if known == word and part_name)
        if parts:
            choices = ", ".join(repr(choice) for choice in parts)
            raise HookNameError(f"hook name {word!r} needs the module it sits in, one of {choices}; got {given_part!r}")
        words = {known for known, _ in index} | set(ALIASES)
        raise HookNameError(
            f"no hook point is called {name!r}.{suggest_names(word, words)} "
            "model.hook_table() lists the points a model has"
        )
    per_layer = HOOK_SITES[template].per_layer
    if per_layer and given_layer is None:
        raise HookNameError(f"hook name {name!r} exists once per block: give the layer, as in ({word!r}, 0)")
    if not per_layer:
        if given_layer is not None:
            raise HookNameError(f"hook point {template!r} exists once per model: leave the layer {given_layer} out")
        return template
    assert given_layer is not None
    return template.replace("{i}", str(resolve_layer(given_layer, n_layers, what=f"hook name {name!r}")))


def resolve_layer(layer: int, n_layers: int | None, *, what: str) -> int:
    """Check a layer and count a negative one from the end.

    Raises:
        HookNameError: the layer is outside `[-n_layers, n_layers)`, or negative with `n_layers` unknown.
    """
    if n_layers is None:
        if layer < 0:
            raise HookNameError(f"{what}: a negative layer ({layer}) needs the number of layers")
        return layer
    if not -n_layers <= layer < n_layers:
        raise HookNameError(
            f"{what}: layer {layer} is out of range; the model has {n_layers} layers, "
            f"0 to {n_layers - 1} (or -{n_layers} to -1 from the end)"
        )
    return layer % n_layers
