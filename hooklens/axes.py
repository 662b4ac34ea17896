"""The glossary: axis names, the hook points there can be, and how a hook point is named.

Every other module takes its words from here. Sizes are `d_model d_head d_mlp d_vocab n_layers n_heads
n_kv_heads n_ctx`; axes are the keys of `AXES`. With a key-value cache `pos` and `query` are the new
tokens and `key` is past + new tokens.
"""

import operator
import re
from dataclasses import dataclass
from typing import SupportsIndex

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
    "d_head_v": "width of one head's values in latent attention",
    "d_nope": "entries of a head that do not turn, in latent attention",
    "d_rope": "entries of a head that turn, in latent attention",
    "d_q_latent": "width of what queries are made of in latent attention",
    "d_kv_latent": "width of what keys and values are made of in latent attention",
    "d_mlp": "neurons of one MLP",
    "expert": "experts of a mixture",
    "choice": "the experts chosen for a token, in the order of their scores",
    "d_expert": "neurons of one expert",
    "d_shared": "neurons of the expert that sees every token",
    "d_vocab": "entries of the vocabulary",
    "d_vocab_out": "outputs of the unembedding: d_vocab, or the classes of a classifier",
    "d_embed": "width of the token embedding, where that is projected to d_model",
    "position": "rows of a table of learned positions: n_ctx, and the rows before position 0",
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
        discrete: whole numbers that name something, such as experts or tokens: they have no gradient, and no arithmetic
            is done with them. A discrete point on request is selected by its name alone, not by a glob or a predicate,
            which are about activations.
    """

    template: str
    axes: tuple[str, ...]
    description: str
    on_request: bool = False
    repeats: str | None = None
    discrete: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether the point exists once per block."""
        return "{i}" in self.template

    @property
    def position_axis(self) -> int | None:
        """Which axis runs over the tokens of the call; None where none does."""
        return next((self.axes.index(axis) for axis in ("pos", "query") if axis in self.axes), None)


HOOK_SITES: dict[str, HookSite] = {}
"""Every kind of hook point there is, by template: what the parts of a network have declared."""

# Templates by short word, and by the module they sit in (None: in the block or the model itself) and whether it is in
# a block.
_TEMPLATES: dict[str, dict[tuple[str | None, bool], str]] = {}


def declare_axis(name: str, description: str) -> None:
    """Add an axis to the glossary, for parts that bring one of their own.

    Raises:
        HookNameError: the word stands for something else already.
    """
    if AXES.setdefault(name, description) != description:
        raise HookNameError(f"axis {name!r} is {AXES[name]!r} already; give the axis another name")


def declare_site(site: HookSite) -> HookSite:
    """Add a kind of hook point, which has one meaning in all networks.

    Values may have a width of their own in some.

    Raises:
        HookNameError: an axis is not in `AXES`, or the name has other axes already.
    """
    unknown = [axis for axis in site.axes if axis not in AXES]
    if unknown:
        raise HookNameError(f"hook point {site.template!r}: axes {unknown} are unknown; declare_axis adds one")
    known = HOOK_SITES.setdefault(site.template, site)
    if known is not site and list(map(_plain_width, known.axes)) != list(map(_plain_width, site.axes)):
        raise HookNameError(
            f"hook point {site.template!r} carries {list(known.axes)} in other networks, not {list(site.axes)}; give "
            "it another name"
        )
    *path, point = site.template.split(".")
    module = path[-1] if path and path[-1] != "{i}" else None
    _TEMPLATES.setdefault(point.removeprefix("hook_"), {})[module, site.per_layer] = site.template
    return known


def _plain_width(axis: str) -> str:
    """What an axis is called where values are as wide as queries and keys, and embeddings as the stream."""
    return {"d_head_v": "d_head", "d_embed": "d_model"}.get(axis, axis)


_LAYER = re.compile(r"^blocks\.(\d+)\.")


def find_site(name: str) -> HookSite | None:
    """The kind of hook point that `name` is one of; None for points outside the transformer's grammar."""
    return HOOK_SITES.get(_LAYER.sub("blocks.{i}.", name))


def name_repeats(name: str) -> str | None:
    """The point that repeats the key-value heads at `name` for each query head; None where there is none.

    `"blocks.3.attn.hook_k"` gives `"blocks.3.attn.hook_k_per_head"`. Models have it where query heads share keys.
    """
    match = _LAYER.match(name)
    own = _LAYER.sub("blocks.{i}.", name)
    template = next((site.template for site in HOOK_SITES.values() if site.repeats == own), None)
    return template if template is None or match is None else template.replace("{i}", match.group(1))


def layer_of(name: str) -> int | None:
    """The layer in a hook name: `"blocks.3.hook_resid_pre"` gives 3, `"hook_embed"` gives None."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


EMBEDDINGS = ("hook_embed", "hook_pos_embed")
"""The hook points of what the stream begins with, as a sum."""


def is_below_blocks(name: str) -> bool:
    """Whether a hook point stands between the tokens and the first block."""
    return name in ("hook_tokens", *EMBEDDINGS) or name.startswith("embed.")


def is_past_blocks(name: str) -> bool:
    """Whether a hook point stands behind the last block: in the final norm or the unembedding."""
    return layer_of(name) is None and not is_below_blocks(name)


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
_SHORTHAND = re.compile(r"(?P<word>[a-z_]+?)(?P<layer>-?[0-9]{1,9})(?P<part>[a-z_0-9]*)")
_LAYER_TEXT = re.compile(r"-?[0-9]{1,9}")


def get_act_name(
    name: str, layer: SupportsIndex | str | None = None, part: str | None = None, *, n_layers: int | None = None
) -> str:
    """The full hook name of a shorthand.

    `("resid_pre", 3)` gives `"blocks.3.hook_resid_pre"`; `("scale", 3, "ln1")` gives
    `"blocks.3.ln1.hook_scale"`; `("k3")` gives `"blocks.3.attn.hook_k"`; `("scale")` without a layer is the
    final norm's. A full name comes back as it is.

    Args:
        name: a full hook name, a shorthand, or one of the field's aliases (`"attn"` is the pattern).
        layer: the block, as a number or its text (`"3"`); may also stand inside `name` (`"k3"`). Negative ones need
            `n_layers`.
        part: the module, where the word alone is ambiguous: `"ln1"`, `"ln2"`, `"q_norm"`, ...
        n_layers: number of blocks, used to check `layer` and to count negative ones from the end.

    Raises:
        HookNameError: no hook point has that name, or a layer or part is missing, too much, or of another kind.
    """
    if not isinstance(name, str) or not isinstance(part, str | None):
        raise HookNameError(
            f"{name!r} with part {part!r} names no hook point; expected text: a full name, or a word such as "
            "'resid_pre', with a module such as 'ln1' where it needs one"
        )
    if layer is None and part is None and find_site(name) is not None:
        return name
    word, given_layer, given_part = name, layer, part
    if layer is None and (match := _SHORTHAND.fullmatch(name)):
        word, given_layer = match["word"], match["layer"]
        if part is not None and match["part"] not in ("", part):
            raise HookNameError(f"hook name {name!r} already names a module; leave the part {part!r} out")
        given_part = match["part"] or part
    word = ALIASES.get(word, word)
    number = None if given_layer is None else resolve_layer(given_layer, n_layers, what=f"hook name {name!r}")
    if word in {"scale", "normalized"} and given_part is None and number is None:
        given_part = "ln_final"
    template = _find_template(name, word, number, given_part)
    if not HOOK_SITES[template].per_layer:
        if number is not None:
            raise HookNameError(f"hook point {template!r} exists once per model: leave the layer {number} out")
        return template
    if number is None:
        example = (word, 0) if given_part is None else (word, 0, given_part)
        raise HookNameError(f"hook name {name!r} exists once per block: give the layer, as in {example}")
    return template.replace("{i}", str(number))


def _find_template(name: str, word: str, layer: int | None, part: str | None) -> str:
    index = _TEMPLATES
    if word not in index:
        raise HookNameError(
            f"no hook point is called {name!r}.{suggest_names(word, [*index, *ALIASES])} "
            "model.hook_table() lists the points a model has"
        )
    # A module that there is in blocks and outside of them is the one that the layer says.
    order = (layer is None, layer is not None)
    places = {module: found for is_in in order for (module, own), found in index[word].items() if own is is_in}
    if part is None and len(places) == 1:
        return next(iter(places.values()))
    if part in places:
        return places[part]
    in_blocks = {module: template for module, template in places.items() if "{i}" in template}
    if layer is not None and in_blocks:
        places = in_blocks
    if part is None:
        # The word alone means the outermost of several: the MLP's neurons, not those of an expert inside it.
        depth = min(template.count(".") for template in places.values())
        outermost = [template for template in places.values() if template.count(".") == depth]
        if len(outermost) == 1:
            return outermost[0]
    modules = ", ".join(repr(module) for module in sorted(filter(None, places)))
    needs = f"needs the module it sits in, one of {modules}" if modules else "sits in no module, so leave that out"
    names = ", ".join(repr(template.replace("{i}", str(layer or 0))) for template in places.values())
    raise HookNameError(f"hook name {word!r} {needs}; got {part!r}. Full names: {names}")


def resolve_layer(layer: SupportsIndex | str, n_layers: int | None, *, what: str) -> int:
    """Check a layer, a number or its text, and count a negative one from the end.

    Raises:
        HookNameError: the layer is outside `[-n_layers, n_layers)`, negative with `n_layers` unknown, or no whole
            number.
    """
    number = _read_layer(layer)
    if number is not None and abs(number) >= 10**9:
        raise HookNameError(f"{what}: the layer has more than 9 digits; expected a whole number such as 3, or its text")
    if number is None:
        raise HookNameError(f"{what}: layer {layer!r}; expected a whole number such as 3, or its text")
    if n_layers is None:
        if number < 0:
            raise HookNameError(f"{what}: a negative layer ({number}) needs the number of layers")
        return number
    if not -n_layers <= number < n_layers:
        raise HookNameError(
            f"{what}: layer {number} is out of range; the model has {n_layers} layers, "
            f"0 to {n_layers - 1} (or -{n_layers} to -1 from the end)"
        )
    return number % n_layers


def _read_layer(layer: SupportsIndex | str) -> int | None:
    """A layer as a plain number; None for masks, fractions and what else counts no blocks."""
    if isinstance(layer, str):
        return int(layer) if _LAYER_TEXT.fullmatch(layer) else None
    # A boolean tensor is an index to Python.
    dtype, n_axes = str(getattr(layer, "dtype", "")), getattr(layer, "ndim", 0)
    if isinstance(layer, bool) or "bool" in dtype or n_axes:
        return None
    try:
        return operator.index(layer)
    except TypeError:
        return None
