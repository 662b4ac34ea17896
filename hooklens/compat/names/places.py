"""What hook point shows what enters and leaves a place of the network: a map, a norm, a part, a block.

Other libraries name places by modules, and by what goes into and comes out of them. Here stands, once for all of them,
which of these tensors have a hook point, and why the others have none.
"""

from dataclasses import dataclass, replace
from typing import Literal

from hooklens.axes import layer_of
from hooklens.config import BlockConfig, HookedConfig, MoEConfig

Side = Literal["in", "out"]
_Branch = Literal["attn", "mlp"]

_WORDS = {"attn": "attention", "mlp": "the MLP"}
_HEADS = "there heads lie side by side in the last axis, here they have an axis of their own"
_HEADS_NORMED = "there heads may lie side by side in the last axis, and before the positions"
_LATENTS = {"q_latent_norm": "hook_q_latent", "kv_latent_norm": "hook_kv_latent"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A hook point whose values are those of a place.

    Attributes:
        name: of the hook point.
        note: what differs in shape, or in when it is there; empty: nothing.
        edit: what an edit there reaches, where an edit here reaches something else; empty: the same.
    """

    name: str
    note: str = ""
    edit: str = ""


@dataclass(frozen=True)
class Differs:
    """Why no hook point has the values of a place.

    Attributes:
        why: in a clause that goes on from "it has no hook point here: ".
    """

    why: str


Found = Point | Differs


def _nothing(verb: str, place: str) -> Differs:
    return Differs(f"nothing shows what {verb} {place}")


def _to_one_map(found: Found) -> Found:
    """What a part reads, as one of its maps reads it."""
    return replace(found, edit="an edit there reaches this map alone") if isinstance(found, Point) else found


class Places:
    """The places of a network.

    Args:
        cfg: the network.
    """

    def __init__(self, cfg: HookedConfig) -> None:
        self._cfg = cfg

    def find(self, place: str, side: Side) -> Found:
        """What shows what enters or leaves a place.

        Args:
            place: a map by its weight (`"blocks.3.attn.W_Q"`), a norm (`"blocks.3.ln1"`), a part (`"blocks.3.attn"`), a
                block, or the base model (`""`).
            side: what enters, or what leaves.
        """
        layer = layer_of(f"{place}.")
        if layer is None:
            return self.check(self._enters(place) if side == "in" else self._leaves(place))
        block = _Block(self._cfg.block(layer), f"blocks.{layer}")
        return self.check(block.find(place.removeprefix(block.name).removeprefix("."), side))

    def check(self, found: Found) -> Found:
        """The same, where the network has the point."""
        description = self._cfg.description
        if isinstance(found, Differs) or found.name in description.points:
            return found
        return Differs(description.why_absent(found.name) or f"this model has no hook point {found.name!r}")

    def _enters(self, place: str) -> Found:
        """What shows what enters a place outside the blocks."""
        if place == "unembed.W_U" and self._cfg.d_embed is not None:
            return Differs("it is the stream in the width of the token embedding; unembed.hook_in is before that")
        entrances = {
            "": "hook_tokens",
            "embed.W_E": "hook_tokens",
            "ln_final": f"blocks.{self._cfg.n_layers - 1}.hook_resid_post",
            "unembed.W_proj_out": "unembed.hook_in",
            "unembed.W_U": "unembed.hook_in",
        }
        return Point(name=entrances[place]) if place in entrances else _nothing("enters", place)

    def _leaves(self, place: str) -> Found:
        """What shows what leaves a place outside the blocks."""
        scale = self._cfg.logits_scale
        if place == "unembed.W_U" and scale != 1:
            return Differs(f"unembed.hook_out shows the logits times the model's logits_scale={scale:g}")
        if place.startswith("embed."):
            return self._leaves_embedding(place.removeprefix("embed."))
        if place == "" and self._cfg.d_embed is not None:
            return Differs("it is in the width of the token embedding, behind unembed.W_proj_out")
        exits = {
            "": Point(name="unembed.hook_in"),
            "ln_final": Point(name="unembed.hook_in"),
            "unembed.W_U": Point(name="unembed.hook_out"),
            "pos_embed.W_pos": Point(name="hook_pos_embed", note="there one row may serve the whole batch"),
        }
        return exits.get(place) or _nothing("leaves", place)

    def _leaves_embedding(self, place: str) -> Found:
        """What shows what a step of the embedding gives."""
        cfg, behind = self._cfg, []
        if place == "W_E" and cfg.d_embed is not None:
            behind.append("the projection to d_model")
        # A norm has taken the factor in.
        if place != "ln" and cfg.embed_scale is not None:
            behind.append(
                f"the factor embed_scale={cfg.embed_scale:g}, which transformers' module has in it or not, by family "
                "and version"
            )
        if place != "ln" and cfg.embed_norm is not None:
            behind.append("the norm of the embedding")
        return Differs(f"hook_embed stands behind {' and '.join(behind)}") if behind else Point(name="hook_embed")


@dataclass(frozen=True)
class _Block:
    """The places in a block.

    Attributes:
        block: the layer.
        name: `"blocks.3"`.
    """

    block: BlockConfig
    name: str

    def find(self, place: str, side: Side) -> Found:
        """What shows what enters or leaves a place in the block (`""`: the block)."""
        part, _, rest = place.partition(".")
        ways = {
            ("attn", "in"): self._enters_attention,
            ("attn", "out"): self._leaves_attention,
            ("mlp", "in"): self._enters_mlp,
            ("mlp", "out"): self._leaves_mlp,
        }
        if (part, side) in ways:
            return ways[part, side](rest)
        return self._enters(place) if side == "in" else self._leaves(place)

    def _enters(self, place: str) -> Found:
        """What shows what enters the block or a norm of it."""
        reached = "attention and the MLP" if self.block.cfg.shared_norm else "attention"
        entrances: dict[str, Found] = {
            "": Point(name=f"{self.name}.hook_resid_pre"),
            "ln1": Point(
                name=f"{self.name}.hook_resid_pre", edit=f"an edit there reaches {reached}, not the skip connection"
            ),
            "ln2": Point(name=f"{self.name}.hook_mlp_in"),
            "ln1_post": self._adds("attn", is_normed=False),
            "ln2_post": self._adds("mlp", is_normed=False),
        }
        return entrances.get(place) or Differs("it is the sum before the norm of the stream")

    def _leaves(self, place: str) -> Found:
        """What shows what leaves the block or a norm of it."""
        exits: dict[str, Found] = {
            "": Point(name=f"{self.name}.hook_resid_post"),
            "ln1_post": self._adds("attn", is_normed=True),
            "ln2_post": self._adds("mlp", is_normed=True),
            "ln1_stream": Point(name=f"{self.name}.hook_resid_mid"),
            "ln2_stream": Point(name=f"{self.name}.hook_resid_post"),
        }
        return exits.get(place) or self._leaves_norm(place)

    def _leaves_norm(self, place: str) -> Found:
        """What shows what a norm gives."""
        path = f"{self.name}.{place}"
        description = self.block.cfg.description
        norm = description.norms.get(path)
        if norm is None:
            return Differs(description.why_absent(path) or f"this model has no {path}")
        if norm.weight or norm.bias:
            behind = "weight and bias" if norm.bias else "weight"
            return Differs(
                f"it is what the norm {path} gives, behind its {behind}; {path}.hook_normalized stands before these"
            )
        return Point(name=f"{path}.hook_normalized")

    def _reads(self, branch: _Branch) -> Found:
        """What shows what a branch reads."""
        norm = self.block.attn_norm if branch == "attn" else self.block.mlp_norm
        if norm is not None:
            found = self._leaves_norm(norm)
            if isinstance(found, Point) and self.block.cfg.shared_norm:
                return replace(found, edit=f"an edit there reaches {_WORDS[branch]} alone, here both branches")
            return found
        if branch == "mlp":
            return Point(name=f"{self.name}.hook_mlp_in")
        return Point(
            name=f"{self.name}.hook_resid_pre",
            edit="an edit there reaches attention, not the skip connection (here: hook_attn_in, a copy per head)",
        )

    def _adds(self, branch: _Branch, *, is_normed: bool) -> Found:
        """What shows what a branch makes.

        Args:
            branch: which.
            is_normed: it is what a norm behind the branch gives.
        """
        point, behind = f"{self.name}.hook_{branch}_out", []
        if self.block.norm_after and not is_normed:
            behind.append(f"the norm {'ln1_post' if branch == 'attn' else 'ln2_post'}")
        if self.block.cfg.residual_scale != 1:
            behind.append(f"the factor residual_scale={self.block.cfg.residual_scale:g}")
        if behind:
            return Differs(f"{point} is what {_WORDS[branch]} adds to the stream, behind {' and '.join(behind)}")
        return Point(name=point)

    def _enters_attention(self, place: str) -> Found:
        """What shows what enters attention (`""`) or a part of it."""
        attn = f"{self.name}.attn"
        if place in ("", "W_Q", "W_K", "W_V", "W_DQ"):
            return _to_one_map(self._reads("attn")) if place else self._reads("attn")
        entrances = {"W_O": Point(name=f"{attn}.hook_z", note=_HEADS)}
        entrances |= {norm: Point(name=f"{attn}.{point}") for norm, point in _LATENTS.items()}
        turns = self.block.cfg.qk_norm_after_rotary and f"{attn}.hook_rot_q" in self.block.cfg.description.points
        for letter in "qk":
            point = f"hook_rot_{letter}" if turns else f"hook_{letter}"
            entrances[f"{letter}_norm"] = Point(name=f"{attn}.{point}", note=_HEADS_NORMED)
        return entrances.get(place) or _nothing("enters", f"{attn}.{place}")

    def _leaves_attention(self, place: str) -> Found:
        """What shows what leaves attention (`""`) or a part of it."""
        attn, clip = f"{self.name}.attn", self.block.cfg.clip_qkv
        if place in ("", "W_O"):
            return self._adds("attn", is_normed=False)
        if place.endswith("_norm"):
            found = self._leaves_norm(f"attn.{place}")
            return replace(found, note=_HEADS_NORMED) if isinstance(found, Point) and place not in _LATENTS else found
        if place == "W_V" and clip is not None:
            return Differs(f"{attn}.hook_v shows values held within clip_qkv={clip:g}")
        exits = {f"W_{letter.upper()}": Point(name=f"{attn}.hook_{letter}", note=_HEADS) for letter in "qkv"}
        exits["W_DQ"] = Point(name=f"{attn}.hook_q_latent")
        return exits.get(place) or _nothing("leaves", f"{attn}.{place}")

    @property
    def _has_experts(self) -> bool:
        return self.block.mlp is not None and self.block.mlp.kind != "mlp"

    def _enters_mlp(self, place: str) -> Found:
        """What shows what enters the MLP (`""`) or a part of it."""
        mlp = f"{self.name}.mlp"
        if place in ("", "W_router", "shared.W_in", "shared.W_gate", "shared.W_shared_gate"):
            return _to_one_map(self._reads("mlp")) if place else self._reads("mlp")
        if place == "shared.W_out":
            return Point(name=f"{mlp}.shared.hook_post", note="there tokens may lie in one axis")
        if self._has_experts:
            return _of_experts()
        if place in ("W_in", "W_gate"):
            found = self._reads("mlp")
            return _to_one_map(found) if self.block.cfg.gated_mlp else found
        entrances = {"act": Point(name=f"{mlp}.hook_pre"), "W_out": Point(name=f"{mlp}.hook_post")}
        return entrances.get(place) or _nothing("enters", f"{mlp}.{place}")

    def _leaves_mlp(self, place: str) -> Found:
        """What shows what leaves the MLP (`""`) or a part of it."""
        mlp, is_gated = f"{self.name}.mlp", self.block.cfg.gated_mlp
        if place == "" or (place == "W_out" and not self._has_experts):
            return self._adds("mlp", is_normed=False)
        if place == "W_router":
            return self._leaves_router()
        if place.startswith("shared."):
            return self._leaves_shared_expert(place.removeprefix("shared."))
        if self._has_experts:
            return _of_experts()
        exits: dict[str, Found] = {
            "W_in": Point(name=f"{mlp}.{'hook_pre_linear' if is_gated else 'hook_pre'}"),
            "W_gate": Point(name=f"{mlp}.hook_pre"),
            "act": Differs(f"it is the activated gate; {mlp}.hook_post is this times the linear half")
            if is_gated
            else Point(name=f"{mlp}.{'hook_post' if self.block.cfg.act_norm is None else 'hook_mid'}"),
        }
        return exits.get(place) or _nothing("leaves", f"{mlp}.{place}")

    def _leaves_router(self) -> Found:
        """What shows what leaves the router."""
        mlp, router = self.block.mlp, f"{self.name}.mlp.router"
        if isinstance(mlp, MoEConfig) and mlp.router == "sigmoid_input":
            return Differs(
                f"the router gives the gates first, as {router}.hook_weights, and {router}.hook_logits second"
            )
        return Point(name=f"{router}.hook_logits", note="there [token expert], here [batch pos expert]")

    def _leaves_shared_expert(self, place: str) -> Found:
        """What shows what leaves a map of the expert that sees every token."""
        shared = f"{self.name}.mlp.shared"
        if place == "W_out" and f"{shared}.hook_gate" in self.block.cfg.description.points:
            return Differs(f"{shared}.hook_out is this times {shared}.hook_gate")
        if place == "W_shared_gate":
            return Differs(f"{shared}.hook_gate is its sigmoid")
        exits = {"W_in": "hook_pre_linear", "W_gate": "hook_pre", "W_out": "hook_out"}
        if place not in exits:
            return _nothing("leaves", f"{shared}.{place}")
        return Point(name=f"{shared}.{exits[place]}", note="there tokens may lie in one axis")


def _of_experts() -> Differs:
    return Differs(
        "it runs for the tokens of an expert only, in an order of its own; mlp.experts.hook_pre, hook_pre_linear and "
        "hook_post have all tokens, with an axis for the experts chosen"
    )
