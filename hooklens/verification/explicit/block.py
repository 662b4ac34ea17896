"""One block, computed again from its definition."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import (
    AlibiPositions,
    BlockConfig,
    MLAConfig,
    MoEConfig,
    RotaryPositions,
    ShortformerPositions,
)
from hooklens.verification.explicit.activations import (
    activate,
    clamped_swiglu,
    xielu,
)
from hooklens.verification.explicit.experts import Mixture
from hooklens.verification.explicit.latents import Latents
from hooklens.verification.explicit.positions import (
    alibi_term,
    query_temperature,
)

if TYPE_CHECKING:
    from hooklens.verification.explicit.network import ExplicitNetwork

Read = Callable[[str], Tensor]


class Unknown(Exception):  # noqa: N818
    """A tensor that has no definition here; the text says why."""


class BlockFormulas:
    """The definitions of one layer."""

    def __init__(self, network: "ExplicitNetwork", block: BlockConfig, read: Read) -> None:
        self.network, self.cfg, self.block = network, network.cfg, block
        self.place = f"blocks.{block.layer}"
        self._read = read
        self.weights = network.weights
        self.group = self.cfg.n_heads // self.cfg.n_kv_heads

    def at(self, own: str) -> Tensor:
        """What one of the layer's points shows."""
        return self._read(f"{self.place}.{own}")

    def has(self, own: str) -> bool:
        """Whether the layer has a point."""
        return f"{self.place}.{own}" in self.network.names

    def compute(self, own: str) -> Tensor:
        """The tensor at one of the layer's points."""
        *path, last = own.split(".")
        if last in ("hook_scale", "hook_normalized"):
            return self._compute_norm(".".join(path), last)
        formula = self._formulas().get(own)
        if formula is None:
            raise Unknown(f"{self.place}.{own}: the point belongs to a part of one's own")
        return formula()

    def _formulas(self) -> dict[str, Callable[[], Tensor]]:
        cfg = self.cfg
        return {
            "hook_resid_pre": self._resid_pre,
            "hook_attn_in": lambda: torch.stack([self.at("hook_resid_pre")] * cfg.n_heads, 2),
            "hook_q_input": lambda: self.at("hook_attn_in"),
            "hook_k_input": self._input_of_kv_heads,
            "hook_v_input": self._input_of_kv_heads,
            "attn.hook_q": lambda: self._project("q", cfg.n_heads),
            "attn.hook_k": lambda: self._project("k", cfg.n_kv_heads),
            "attn.hook_v": lambda: self._clip(self._project("v", cfg.n_kv_heads)),
            "attn.hook_k_per_head": lambda: self._per_query_head(self.at("attn.hook_k")),
            "attn.hook_v_per_head": lambda: self._per_query_head(self.at("attn.hook_v")),
            "attn.hook_rot_q": lambda: self._rotate(self._entering_rotation("q")),
            "attn.hook_rot_k": lambda: self._rotate(self._entering_rotation("k")),
            "attn.hook_attn_scores": self._scores,
            "attn.hook_pattern": self._pattern,
            "attn.hook_z": self._weigh_values,
            "attn.hook_result": self._results,
            "hook_attn_out": lambda: self._leave("ln1_post", self._attention()),
            "hook_resid_mid": lambda: self._normed_stream("ln1", self._behind_attention()),
            "hook_mlp_in": lambda: self.at("hook_resid_mid" if self.has("hook_resid_mid") else "hook_resid_pre"),
            "mlp.hook_pre": lambda: self.weights.apply(
                f"{self.place}.mlp.{'gate_proj' if cfg.gated_mlp else 'in_proj'}", self._input_of_mlp()
            ),
            "mlp.hook_pre_linear": lambda: self.weights.apply(f"{self.place}.mlp.in_proj", self._input_of_mlp()),
            "mlp.hook_mid": self._neurons,
            "mlp.hook_post": self._normed_neurons,
            "hook_mlp_out": lambda: self._leave("ln2_post", self._mlp()),
            "hook_resid_post": self._resid_post,
            **self._mixture_formulas(),
            **self._latent_formulas(),
        }

    def _latent_formulas(self) -> dict[str, Callable[[], Tensor]]:
        if not isinstance(self.block.attn, MLAConfig):
            return {}
        latents = Latents(self.block.attn, self.network, self.place, self._read)
        return {f"attn.{own}": formula for own, formula in latents.formulas().items()}

    def _mixture_formulas(self) -> dict[str, Callable[[], Tensor]]:
        if not isinstance(self.block.mlp, MoEConfig):
            return {}
        place = f"{self.place}.mlp"
        act_fn = self.cfg.act_fn
        mixture = Mixture(self.block.mlp, self.weights, place, act_fn, lambda own: self.at(f"mlp.{own}"))
        return {f"mlp.{own}": formula for own, formula in mixture.formulas(self._input_of_mlp).items()}

    def _resid_pre(self) -> Tensor:
        if self.block.layer:
            return self._read(f"blocks.{self.block.layer - 1}.hook_resid_post")
        return self.network.entrance(self._read)

    def _resid_post(self) -> Tensor:
        if not self.cfg.norm_stream and not self.has("hook_resid_mid"):
            return self._sum("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
        behind = self._behind_mlp() if self.has("hook_mlp_out") else self._behind_attention()
        return self._normed_stream("ln2" if self.has("hook_mlp_out") else "ln1", behind)

    def _behind_attention(self) -> Tensor:
        return self._sum("hook_resid_pre", "hook_attn_out")

    def _behind_mlp(self) -> Tensor:
        return self._sum("hook_resid_mid" if self.has("hook_resid_mid") else "hook_resid_pre", "hook_mlp_out")

    def _normed_stream(self, ln: str, added: Tensor) -> Tensor:
        """The stream behind a branch, through the norm that stands in it, if one does."""
        return self.network.normed(f"{self.place}.{ln}_stream", added, self._read)

    def _sum(self, *names: str) -> Tensor:
        """The sum of what the layer has of these."""
        first, *others = (self.at(name) for name in names if self.has(name))
        for other in others:
            first = first + other
        return first

    def _leave(self, norm: str, made: Tensor) -> Tensor:
        """What a branch adds to the stream."""
        return self.network.normed(f"{self.place}.{norm}", made, self._read) * self.cfg.residual_scale

    def _compute_norm(self, place: str, last: str) -> Tensor:
        entering: dict[str, Callable[[], Tensor]] = {
            "ln1": lambda: self.at("hook_resid_pre"),
            "ln1_post": self._attention,
            "ln1_stream": self._behind_attention,
            "ln2_stream": self._behind_mlp,
            "ln2": lambda: self.at("hook_mlp_in"),
            "ln2_post": self._mlp,
            "mlp.ln": lambda: self.at("mlp.hook_mid"),
            "attn.q_norm": lambda: self._entering_norm("q"),
            "attn.k_norm": lambda: self._entering_norm("k"),
            "attn.q_latent_norm": lambda: self.at("attn.hook_q_latent"),
            "attn.kv_latent_norm": lambda: self.at("attn.hook_kv_latent"),
        }
        if place not in entering:
            raise Unknown(f"{self.place}.{place}.{last}: the point belongs to a part of one's own")
        return self.network.norm_part(f"{self.place}.{place}", last, entering[place](), self._read)

    # -- attention ----------------------------------------------------------------------------------------------------

    def _input_of_kv_heads(self) -> Tensor:
        """A key-value head reads the mean of the copies of its query heads."""
        copies = self.at("hook_attn_in")
        return torch.stack(
            [copies[:, :, head * self.group : (head + 1) * self.group].mean(2) for head in range(self.cfg.n_kv_heads)],
            2,
        )

    def _project(self, letter: str, n_heads: int) -> Tensor:
        """Each head's map of its own copy of the normed stream."""
        resid, copies, ln1 = self.at("hook_resid_pre"), self.at(f"hook_{letter}_input"), f"{self.place}.ln1"
        normed = self.network.normed(ln1, resid, self._read)
        of_resid = self.network.norm_of(ln1, resid)
        heads = []
        for head in range(n_heads):
            # What was changed in the copy, beside what was changed inside the norm.
            own = normed + (self.network.norm_of(ln1, copies[:, :, head]) - of_resid)
            if letter != "v" and isinstance(self.cfg.positions, ShortformerPositions):
                own = own + self._read("hook_pos_embed")
            weight, bias = self.weights.of_head(f"{self.place}.attn.{letter}_proj", head, self.cfg.d_head)
            heads.append(own @ weight.T + bias)
        return torch.stack(heads, 2)

    def _entering_norm(self, letter: str) -> Tensor:
        """What the norm of queries or keys reads."""
        if not self.cfg.qk_norm_after_rotary:
            return self.at(f"attn.hook_{letter}")
        turned = f"attn.hook_rot_{letter}"
        return self.at(turned) if self.has(turned) else self._entering_rotation(letter)

    def _entering_rotation(self, letter: str) -> Tensor:
        """What is turned, or would be."""
        heads = self.at(f"attn.hook_{letter}")
        if not self.cfg.qk_norm_after_rotary:
            heads = self.network.normed(f"{self.place}.attn.{letter}_norm", heads, self._read)
        return self._clip(heads)

    def _clip(self, heads: Tensor) -> Tensor:
        limit = self.cfg.clip_qkv
        return heads if limit is None else torch.where(heads.abs() < limit, heads, limit * heads.sign())

    def _rotate(self, heads: Tensor) -> Tensor:
        positions = self.block.positions
        return self.network.rotate(heads, positions) if isinstance(positions, RotaryPositions) else heads

    def _attending(self, letter: str) -> Tensor:
        """Queries or keys as the scores read them, but for a temperature."""
        if self.cfg.qk_norm_after_rotary:
            return self.network.normed(f"{self.place}.attn.{letter}_norm", self._entering_norm(letter), self._read)
        turned = f"attn.hook_rot_{letter}"
        return self.at(turned) if self.has(turned) else self._entering_rotation(letter)

    def _per_query_head(self, shared: Tensor) -> Tensor:
        """Query head h reads key-value head h // (heads per key-value head)."""
        return torch.stack([shared[:, :, head // self.group] for head in range(self.cfg.n_heads)], 2)

    def _keys(self) -> Tensor:
        """The key of each query head."""
        keys = self._per_query_head(self._attending("k"))
        if not self.has("attn.hook_k_per_head"):
            return keys
        # What was changed in a copy goes through norm and rotation by itself.
        return keys + (
            self._place_keys(self.at("attn.hook_k_per_head"))
            - self._place_keys(self._per_query_head(self.at("attn.hook_k")))
        )

    def _place_keys(self, keys: Tensor) -> Tensor:
        norm = f"{self.place}.attn.k_norm"
        if self.cfg.qk_norm_after_rotary:
            return self.network.norm_of(norm, self._rotate(self._clip(keys)))
        return self._rotate(self._clip(self.network.norm_of(norm, keys)))

    def _scores(self) -> Tensor:
        cfg, queries, keys = self.cfg, self._attending("q"), self._keys()
        hidden = ~self.network.batch.visible(self.block.window, self.block.chunk, causal=cfg.causal)
        if (kind := self.block.query_temperature) is not None:
            queries = queries * query_temperature(kind, self.network.batch, self.network.dtype)[:, :, None, None]
        alibi, term = self.block.positions, None
        if isinstance(alibi, AlibiPositions):
            term = alibi_term(alibi, cfg.n_heads, self.network.batch, self.block.score_scale, self.network.dtype)
        heads = []
        for head in range(cfg.n_heads):
            scores = queries[:, :, head] @ keys[:, :, head].mT * self.block.score_scale
            if term is not None:
                scores = scores + term[:, head, None, :]
            if cfg.attn_softcap is not None:
                scores = cfg.attn_softcap * torch.tanh(scores / cfg.attn_softcap)
            heads.append(scores.masked_fill(hidden, -torch.inf))
        return torch.stack(heads, 1)

    def _pattern(self) -> Float[Tensor, "batch head query key"]:
        """Exponentials over their sum, a sink's among them; nothing where a query sees no key."""
        scores = self.at("attn.hook_attn_scores")
        largest = scores.amax(-1, keepdim=True)
        sinks = self.weights.find(f"{self.place}.attn.sinks")
        if sinks is not None:
            largest = torch.maximum(largest, sinks[:, None, None])
        shift = torch.where(largest == -torch.inf, 0.0, largest)
        exponentials = torch.exp(scores - shift)
        total = exponentials.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks[:, None, None] - shift)
        return exponentials / torch.where(total == 0, 1.0, total)

    def _weigh_values(self) -> Tensor:
        shared = not self.has("attn.hook_v_per_head")
        values = self._per_query_head(self.at("attn.hook_v")) if shared else self.at("attn.hook_v_per_head")
        pattern = self.at("attn.hook_pattern")
        return torch.stack([pattern[:, head] @ values[:, :, head] for head in range(self.cfg.n_heads)], 2)

    def _results(self) -> Tensor:
        z, o_proj = self.at("attn.hook_z"), f"{self.place}.attn.o_proj"
        return torch.stack(
            [
                z[:, :, head] @ self.weights.to_stream(o_proj, head, self.block.d_head_v).T
                for head in range(self.cfg.n_heads)
            ],
            2,
        )

    def _attention(self) -> Tensor:
        """What attention gives, before a norm behind it."""
        self.network.require(f"{self.place}.attn")
        bias = self.weights.find(f"{self.place}.attn.o_proj.bias")
        written = self.at("attn.hook_result").sum(2)
        return written if bias is None else written + bias

    # -- MLP ----------------------------------------------------------------------------------------------------------

    def _input_of_mlp(self) -> Tensor:
        mlp_in = self.at("hook_mlp_in")
        if self.has("ln2.hook_normalized") or not self.cfg.shared_norm:
            return self.network.normed(f"{self.place}.ln2", mlp_in, self._read)
        resid, ln1 = self.at("hook_resid_pre"), f"{self.place}.ln1"
        normed = self.network.normed(ln1, resid, self._read)
        return normed + (self.network.norm_of(ln1, mlp_in) - self.network.norm_of(ln1, resid))

    def _neurons(self) -> Tensor:
        cfg, pre = self.cfg, self.at("mlp.hook_pre")
        if cfg.act_fn == "clamped_swiglu":
            assert cfg.swiglu_limit is not None
            assert cfg.swiglu_alpha is not None
            return clamped_swiglu(pre, self.at("mlp.hook_pre_linear"), cfg.swiglu_limit, cfg.swiglu_alpha)
        if cfg.act_fn == "xielu":
            active = xielu(pre, *(self.weights[f"{self.place}.mlp.alpha_{side}"] for side in "pn"))
        else:
            active = activate(pre, cfg.act_fn)
        return active * self.at("mlp.hook_pre_linear") if self.has("mlp.hook_pre_linear") else active

    def _normed_neurons(self) -> Tensor:
        """The neurons as they are read."""
        if not self.has("mlp.hook_mid"):
            return self._neurons()
        return self.network.normed(f"{self.place}.mlp.ln", self.at("mlp.hook_mid"), self._read)

    def _mlp(self) -> Tensor:
        """What the MLP gives, before a norm behind it."""
        self.network.require(f"{self.place}.mlp")
        if isinstance(self.block.mlp, MoEConfig):
            written: Tensor = self._mixture_formulas()["mlp.out"]()
            return written
        return self.weights.apply(f"{self.place}.mlp.out_proj", self.at("mlp.hook_post"))
