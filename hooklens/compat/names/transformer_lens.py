"""Names of TransformerLens: hook points of its versions 2 and 3, their shorthands, and those of its bridge."""

import re
from dataclasses import replace

from hooklens.axes import get_act_name, layer_of, resolve_layer
from hooklens.compat.names.places import Differs, Found, Places, Point, Side
from hooklens.config import HookedConfig
from hooklens.errors import HookNameError

_SHORTHAND = re.compile(r"(?P<word>[a-z_]+?)(?P<layer>\d+)(?P<part>[a-z][a-z_0-9]*)?")
_PARTS = {"a": "attn", "m": "mlp", "attention": "attn", "b": None, "block": None, "blocks": None, "": None}
_WORDS = {"mlp_mid": "mid"}
_BLOCK = re.compile(r"blocks\.(-?\d+)(?:\.(.+))?")

# A component of the bridge, and the place it is; of blocks below `blocks.{i}.`.
_OUTER = {"embed": "embed.W_E", "pos_embed": "pos_embed.W_pos", "ln_final": "ln_final", "unembed": "unembed.W_U"}
_INNER = {
    "": "",
    "ln1": "ln1",
    "ln2": "ln2",
    "ln1_post": "ln1_post",
    "ln2_post": "ln2_post",
    "attn": "attn",
    "attn.q": "attn.W_Q",
    "attn.k": "attn.W_K",
    "attn.v": "attn.W_V",
    "attn.o": "attn.W_O",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "mlp": "mlp",
    "mlp.in": "mlp.W_in",
    "mlp.gate": "mlp.W_gate",
    "mlp.out": "mlp.W_out",
}
_OTHER_SPELLINGS = {
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_q_input": "hook_q_input",
    "attn.hook_k_input": "hook_k_input",
    "attn.hook_v_input": "hook_v_input",
    "attn.hook_hidden_states": "attn.hook_out",
    "attn.hook_q_normed": "attn.q_norm.hook_out",
    "attn.hook_k_normed": "attn.k_norm.hook_out",
    "mlp.hook_expert_indices": "mlp.router.hook_choice",
}
_TABLES = frozenset({"hook_cos", "hook_sin"})
_JOINT = "there it is one number for all heads together, here the same one in each head"
_MASKED = "the bridge fills masked entries with the lowest finite number"


def is_transformer_lens(name: str) -> bool:
    """Whether a name has the form of one of TransformerLens's: a hook point's, or a shorthand with its layer."""
    if ".hook_" in name or name.startswith("hook_"):
        return True
    return "." not in name and "[" not in name and _is_known(name)


def _is_known(shorthand: str) -> bool:
    try:
        _spell_out(shorthand, None)
    except HookNameError:
        return False
    return True


def find_transformer_lens(name: str | tuple[str | int, ...], cfg: HookedConfig, notation: str | None) -> Found:
    """The hook point of one of TransformerLens's names.

    Args:
        name: a full name or a shorthand.
        cfg: the network.
        notation: `"transformer_lens-2"`, `"transformer_lens-3"` or `"transformer_bridge"`; None: as all of them mean
            it.
    """
    try:
        full = _spell_out(name, cfg.n_layers)
        layer = layer_of(full)
        if layer is not None:
            resolve_layer(layer, cfg.n_layers, what=f"hook name {full!r}")
    except HookNameError as error:
        return Differs(str(error))
    if "{" in full:
        return Differs("it is a template: put the layer in")
    return _Names(cfg, notation).find(full)


def _spell_out(name: str | tuple[str | int, ...], n_layers: int | None) -> str:
    """The full name of a shorthand, a full name as it is."""
    if isinstance(name, str):
        if "." in name or name.startswith("hook_"):
            return name
        match = _SHORTHAND.fullmatch(name)
        name = (name,) if match is None else (match["word"], int(match["layer"]), match["part"] or "")
    word, layer, part = (*name, *(None,) * (3 - len(name)))[:3]
    if len(name) > 3 or not isinstance(word, str) or not isinstance(part, str | None):
        raise HookNameError(f"{name!r} is no shorthand; expected (word, layer, module), as ('k', 3, 'attn')")
    known = _PARTS.get(part or "", part)
    return get_act_name(_WORDS.get(word, word), layer, known, n_layers=n_layers)


class _Names:
    """TransformerLens's names of one network.

    Args:
        cfg: the network.
        notation: whose names.
    """

    def __init__(self, cfg: HookedConfig, notation: str | None) -> None:
        self._cfg, self._notation = cfg, notation
        self._places = Places(cfg)

    def find(self, name: str) -> Found:
        """The hook point of a full name."""
        if (inside := self._find_inside(name)) is not None:
            return inside
        match = _BLOCK.fullmatch(name)
        layer, rest = (None, name) if match is None else (int(match[1]), match[2] or "")
        if layer is not None:
            rest = _OTHER_SPELLINGS.get(rest, rest)
        path, _, point = rest.rpartition(".")
        if point in _TABLES or path == "rotary_emb":
            return Differs("it is a table of the rotation, no activation: hook_rot_q and hook_rot_k show what it turns")
        if name == "hook_unembed":
            return self._places.find("unembed.W_U", "out")
        path = self._own_norm(path, layer)
        ours = ".".join(filter(None, (None if layer is None else f"blocks.{layer}", path, point)))
        is_bridge = point in ("hook_in", "hook_out")
        if is_bridge and not (
            path in ("unembed", "mlp.shared", "mlp.experts") and ours in self._cfg.description.points
        ):
            return self._find_component(layer, path, "in" if point == "hook_in" else "out")
        if point == "hook_resid_mid" and self._notation == "transformer_bridge":
            found = self._places.check(Point(name=ours))
            edit = "the bridge's edit reaches the MLP, not the skip connection: hook_mlp_in"
            return replace(found, edit=edit) if isinstance(found, Point) else found
        return self._places.check(self._explain_difference(path, point, ours, layer) or Point(name=ours))

    def _find_inside(self, name: str) -> Differs | None:
        """What to ask for where a name lacks its layer; None where it does not."""
        points = self._cfg.description.points
        inside = [point for point in points if point.startswith("blocks.") and point.split(".", 2)[2] == name]
        if name in points or not inside:
            return None
        return Differs(f"{len(inside)} layers have one of this name: put the layer in, as in {inside[0]!r}")

    def _own_norm(self, path: str, layer: int | None) -> str:
        """A norm by its own name here: one that stands behind its branch alone is called like one before it there."""
        if layer is None or path not in ("ln1", "ln2"):
            return path
        block = self._cfg.block(layer)
        return f"{path}_post" if block.norm_after and not block.norm_before else path

    def _find_component(self, layer: int | None, path: str, side: Side) -> Found:
        """What enters or leaves one of the bridge's components."""
        known = _OUTER if layer is None else _INNER
        if path not in known:
            if path == "attn.qkv":
                return Differs("it is three maps in one: attn.hook_q, attn.hook_k and attn.hook_v")
            return Differs(f"the bridge's {path!r} is no part with a hook point of its own here")
        place = known[path]
        if place == "mlp.W_gate" and layer is not None and self._has_experts(layer):
            place = "mlp.W_router"
        found = self._places.find(place if layer is None else f"blocks.{layer}.{place}".removesuffix("."), side)
        # The bridge gives heads an axis of their own, as here.
        if isinstance(found, Point) and place in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"):
            return replace(found, note="")
        if isinstance(found, Point) and place == "mlp.W_router":
            return replace(found, edit="an edit there has no effect: the same module has chosen the experts already")
        return found

    def _has_experts(self, layer: int) -> bool:
        mlp = self._cfg.block(layer).mlp
        return mlp is not None and mlp.kind != "mlp"

    def _explain_difference(self, path: str, point: str, ours: str, layer: int | None) -> Found | None:
        """What a name that is also one of ours means otherwise there; None where it means the same."""
        if point == "hook_normalized":
            return self._explain_normalized(ours)
        if point == "hook_attn_scores":
            return self._explain_scores(ours)
        if path == "ln2" and layer is not None and self._cfg.shared_norm and self._cfg.block(layer).norm_before:
            return Point(
                name=ours.replace(".ln2.", ".ln1."),
                note="one norm feeds both branches; TransformerLens has a copy of it for the MLP",
                edit="an edit there reaches the MLP alone, here both branches",
            )
        if path.startswith("mlp") and layer is not None and self._has_experts(layer):
            return _explain_experts(path, point, ours)
        is_joint = path in ("attn.q_norm", "attn.k_norm") and self._cfg.qk_norm_over == "all_heads"
        return Differs(_JOINT) if is_joint and point == "hook_scale" else None

    def _explain_scores(self, ours: str) -> Found | None:
        """What the bridge's scores differ in; None where they are not the bridge's."""
        if self._notation is None:
            return Point(name=ours, note=f"{_MASKED}, other versions and HookLens with -inf")
        return Differs(f"{_MASKED}; here they are -inf") if self._notation == "transformer_bridge" else None

    def _explain_normalized(self, ours: str) -> Differs | None:
        """Why the normed tensor of 2.x is another one; None where it is the same."""
        norm = self._cfg.description.norms.get(ours.rpartition(".")[0])
        is_plain = norm is None or norm.kind != "layer" or not (norm.weight or norm.bias)
        if is_plain or self._notation in ("transformer_lens-3", "transformer_bridge"):
            return None
        differs = (
            f"TransformerLens 2.x shows what the LayerNorm gives, behind its weight and bias, and {ours!r} is before "
            "these, as in 3.x and as in a 2.x model with folded weights"
        )
        asks = ": say which you mean, notation='transformer_lens-3' for the one before"
        return Differs(differs if self._notation else differs + asks)


def _explain_experts(path: str, point: str, ours: str) -> Found | None:
    """What names of a mixture of experts mean there; None where they mean the same."""
    if point == "hook_choice":
        return Point(name=ours, note="there [token choice], here [batch pos choice]")
    if point in ("hook_expert_weights", "hook_router_scores"):
        return Differs(
            "there it is the softmax over all experts; mlp.router.hook_logits is before it, and hook_weights has the "
            "gates of the experts chosen"
        )
    if path.startswith("mlp.experts."):
        return Differs(
            "there an expert sees its own tokens only; mlp.experts.hook_pre, hook_pre_linear and hook_post have all "
            "tokens, with an axis for the experts chosen"
        )
    if path == "mlp" and point in ("hook_pre", "hook_pre_linear", "hook_post"):
        return Differs("a mixture of experts has its neurons at mlp.experts.hook_pre, hook_pre_linear and hook_post")
    return None
