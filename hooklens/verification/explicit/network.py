"""What each hook point has to show, given what the points before it show."""

import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import AlibiPositions, BlockConfig, LearnedPositions, NormConfig, RotaryPositions
from hooklens.model.attention import Attention
from hooklens.model.mlp import MLP
from hooklens.verification.explicit.activations import activate, centre, denominator
from hooklens.verification.explicit.batch import Batch
from hooklens.verification.explicit.positions import alibi_term, rotary_table, rotate
from hooklens.verification.explicit.weights import ExplicitWeights, why_unknown

Read = Callable[[str], Tensor]
LOGITS = "logits"
"""Stands for what a call gives back, where hook points stand by their names."""

_LAYER = re.compile(r"^blocks\.\d+\.")


class Unknown(Exception):  # noqa: N818
    """A tensor that has no definition here; the text says why."""


class ExplicitNetwork:
    """The definitions of a network's activations on one batch.

    `compute(name, read)` makes the tensor at a hook point from those that `read` gives: what a run has shown, or what
    was computed before. All are float64 `[batch pos ...]` over whole sequences.

    Args:
        model: the network. Its parameters are read, none of its code runs.
        batch: the sequences.
        table_dtype: in which rotary angles are made.
    """

    def __init__(self, model: HookedCausalLM, batch: Batch, *, table_dtype: torch.dtype = torch.float32) -> None:
        self.cfg, self.dtype, self.batch = model.cfg, model.dtype, batch
        self.names = set(model.hook_points())
        self._weights = ExplicitWeights(model)
        self._table_dtype = table_dtype
        self._tables: dict[RotaryPositions, tuple[Tensor, Tensor]] = {}
        self._unknown: dict[str, str] = {}
        for layer, block in enumerate(model.block_list()):
            for own, kind in (("attn", Attention), ("mlp", MLP)):
                part = block._modules.get(own)
                if part is not None and (reason := why_unknown(part, kind)) is not None:
                    self._unknown[f"blocks.{layer}.{own}"] = reason

    def why_unknown(self) -> dict[str, str]:
        """The parts that have no definition here, and why."""
        return dict(self._unknown)

    def compute(self, name: str, read: Read) -> Tensor:
        """The tensor at a hook point, or the logits.

        Raises:
            Unknown: it has no definition here.
        """
        layer = layer_of(name)
        if layer is None:
            return self._compute_outside(name, read)
        block = _BlockFormulas(self, self.cfg.block(layer), read)
        own = _LAYER.sub("", name)
        if own.startswith("attn."):
            self.require(f"blocks.{layer}.attn")
        if own.startswith("mlp."):
            self.require(f"blocks.{layer}.mlp")
        return block.compute(own)

    def require(self, part: str) -> None:
        """Refuse to go on where a part has no definition here."""
        if part in self._unknown:
            raise Unknown(f"{part}: {self._unknown[part]}")

    def _compute_outside(self, name: str, read: Read) -> Tensor:
        formulas: dict[str, Callable[[], Tensor]] = {
            "hook_embed": self._embed,
            "hook_pos_embed": self._embed_positions,
            "ln_final.hook_scale": lambda: self.norm_part("ln_final", "hook_scale", self._last_stream(read), read),
            "ln_final.hook_normalized": lambda: self.norm_part(
                "ln_final", "hook_normalized", self._last_stream(read), read
            ),
            "unembed.hook_in": lambda: self.normed("ln_final", self._last_stream(read), read),
            "unembed.hook_out": lambda: self._unembed(read("unembed.hook_in")),
            LOGITS: lambda: self._cap(read("unembed.hook_out")),
        }
        if name not in formulas:
            raise Unknown(f"{name}: the point belongs to a part of one's own")
        return formulas[name]()

    def _embed(self) -> Tensor:
        # The factor is rounded to the weights' dtype, as models with one are trained.
        factor = self.cfg.embed_scale
        scale = 1.0 if factor is None else float(torch.tensor(factor, dtype=self.dtype))
        return self._weights["embed.table.weight"][self.batch.tokens] * scale

    def _embed_positions(self) -> Tensor:
        assert isinstance(self.cfg.positions, LearnedPositions)
        return self._weights["pos_embed.table.weight"][self.batch.positions() + self.cfg.positions.offset]

    def _unembed(self, x: Tensor) -> Tensor:
        if self.cfg.tied_unembed:
            return x @ self._weights["embed.table.weight"].T
        return self._weights.apply("unembed.proj", x)

    def _cap(self, logits: Tensor) -> Tensor:
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _last_stream(self, read: Read) -> Tensor:
        n_layers = self.cfg.n_layers
        return read(f"blocks.{n_layers - 1}.hook_resid_post") if n_layers else self.entrance(read)

    def entrance(self, read: Read) -> Tensor:
        """The stream entering the first block."""
        embedded = read("hook_embed")
        return embedded + read("hook_pos_embed") if "hook_pos_embed" in self.names else embedded

    def norm_part(self, place: str, own: str, x: Tensor, read: Read) -> Tensor:
        """What a norm's own hook points show."""
        norm = self._norm_at(place)
        if own == "hook_scale":
            return denominator(x, norm)
        return centre(x, norm) / read(f"{place}.hook_scale")

    def normed(self, place: str, x: Tensor, read: Read) -> Tensor:
        """The output of a norm; what enters, where the network has no such norm."""
        if f"{place}.hook_normalized" not in self.names:
            return x
        return self._scaled(place, read(f"{place}.hook_normalized"))

    def norm_of(self, place: str, x: Tensor) -> Tensor:
        """What a norm makes of another tensor than the one it shows."""
        if f"{place}.hook_normalized" not in self.names:
            return x
        norm = self._norm_at(place)
        return self._scaled(place, centre(x, norm) / denominator(x, norm))

    def _norm_at(self, place: str) -> NormConfig:
        """The kind of norm at a place that has one."""
        layer = layer_of(place)
        if layer is None:
            norm = self.cfg.final_norm
        else:
            block = self.cfg.block(layer)
            norm = block.qk_norm if ".attn." in place else block.norm
        assert norm is not None
        return norm

    def _scaled(self, place: str, normalized: Tensor) -> Tensor:
        gain, bias = self._weights.find(f"{place}.w"), self._weights.find(f"{place}.b")
        scaled = normalized
        if gain is not None:
            scaled = normalized * (1 + gain if self._norm_at(place).unit_offset else gain)
        return scaled if bias is None else scaled + bias

    def rotate(self, heads: Tensor, positions: RotaryPositions) -> Tensor:
        """Heads turned by the angles of their positions."""
        if positions not in self._tables:
            self._tables[positions] = rotary_table(positions, self.batch, self.dtype, self._table_dtype)
        return rotate(heads, positions, self._tables[positions])

    @property
    def weights(self) -> ExplicitWeights:
        """The parameters."""
        return self._weights


class _BlockFormulas:
    """The definitions of one layer."""

    def __init__(self, network: ExplicitNetwork, block: BlockConfig, read: Read) -> None:
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
            "attn.hook_v": lambda: self._project("v", cfg.n_kv_heads),
            "attn.hook_k_per_head": lambda: self._per_query_head(self.at("attn.hook_k")),
            "attn.hook_v_per_head": lambda: self._per_query_head(self.at("attn.hook_v")),
            "attn.hook_rot_q": lambda: self._rotate(self._normed_heads("q")),
            "attn.hook_rot_k": lambda: self._rotate(self._normed_heads("k")),
            "attn.hook_attn_scores": self._scores,
            "attn.hook_pattern": self._pattern,
            "attn.hook_z": self._weigh_values,
            "attn.hook_result": self._results,
            "hook_attn_out": lambda: self.network.normed(f"{self.place}.ln1_post", self._attention(), self._read),
            "hook_resid_mid": lambda: self._sum("hook_resid_pre", "hook_attn_out"),
            "hook_mlp_in": lambda: self.at("hook_resid_mid" if self.has("hook_resid_mid") else "hook_resid_pre"),
            "mlp.hook_pre": lambda: self.weights.apply(
                f"{self.place}.mlp.{'gate_proj' if cfg.gated_mlp else 'in_proj'}", self._input_of_mlp()
            ),
            "mlp.hook_pre_linear": lambda: self.weights.apply(f"{self.place}.mlp.in_proj", self._input_of_mlp()),
            "mlp.hook_post": self._neurons,
            "hook_mlp_out": lambda: self.network.normed(f"{self.place}.ln2_post", self._mlp(), self._read),
            "hook_resid_post": self._resid_post,
        }

    def _resid_pre(self) -> Tensor:
        if self.block.layer:
            return self._read(f"blocks.{self.block.layer - 1}.hook_resid_post")
        return self.network.entrance(self._read)

    def _resid_post(self) -> Tensor:
        if self.has("hook_resid_mid"):
            return self._sum("hook_resid_mid", "hook_mlp_out")
        return self._sum("hook_resid_pre", "hook_attn_out", "hook_mlp_out")

    def _sum(self, *names: str) -> Tensor:
        """The sum of what the layer has of these."""
        first, *others = (self.at(name) for name in names if self.has(name))
        for other in others:
            first = first + other
        return first

    def _compute_norm(self, place: str, last: str) -> Tensor:
        entering: dict[str, Callable[[], Tensor]] = {
            "ln1": lambda: self.at("hook_resid_pre"),
            "ln1_post": self._attention,
            "ln2": lambda: self.at("hook_mlp_in"),
            "ln2_post": self._mlp,
            "attn.q_norm": lambda: self.at("attn.hook_q"),
            "attn.k_norm": lambda: self.at("attn.hook_k"),
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
            weight, bias = self.weights.of_head(f"{self.place}.attn.{letter}_proj", head, self.cfg.d_head)
            heads.append(own @ weight.T + bias)
        return torch.stack(heads, 2)

    def _normed_heads(self, letter: str) -> Tensor:
        place = f"{self.place}.attn.{letter}_norm"
        return self.network.normed(place, self.at(f"attn.hook_{letter}"), self._read)

    def _rotate(self, heads: Tensor) -> Tensor:
        positions = self.block.positions
        return self.network.rotate(heads, positions) if isinstance(positions, RotaryPositions) else heads

    def _attending(self, letter: str) -> Tensor:
        """Queries or keys as the scores read them."""
        if self.has(f"attn.hook_rot_{letter}"):
            return self.at(f"attn.hook_rot_{letter}")
        return self._normed_heads(letter)

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
        return self._rotate(self.network.norm_of(f"{self.place}.attn.k_norm", keys))

    def _scores(self) -> Tensor:
        cfg, queries, keys = self.cfg, self._attending("q"), self._keys()
        hidden = ~self.network.batch.visible(self.block.window, causal=cfg.causal)
        alibi, term = self.block.positions, None
        if isinstance(alibi, AlibiPositions):
            term = alibi_term(alibi, cfg.n_heads, self.network.batch, cfg.score_scale, self.network.dtype)
        heads = []
        for head in range(cfg.n_heads):
            scores = queries[:, :, head] @ keys[:, :, head].mT * cfg.score_scale
            if term is not None:
                scores = scores + term[:, head, None, :]
            if cfg.attn_softcap is not None:
                scores = cfg.attn_softcap * torch.tanh(scores / cfg.attn_softcap)
            heads.append(scores.masked_fill(hidden, -torch.inf))
        return torch.stack(heads, 1)

    def _pattern(self) -> Float[Tensor, "batch head query key"]:
        """Exponentials over their sum; nothing where a query sees no key."""
        scores = self.at("attn.hook_attn_scores")
        largest = scores.amax(-1, keepdim=True)
        exponentials = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
        total = exponentials.sum(-1, keepdim=True)
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
                z[:, :, head] @ self.weights.to_stream(o_proj, head, self.cfg.d_head).T
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
        active = activate(self.at("mlp.hook_pre"), self.cfg.act_fn)
        return active * self.at("mlp.hook_pre_linear") if self.has("mlp.hook_pre_linear") else active

    def _mlp(self) -> Tensor:
        """What the MLP gives, before a norm behind it."""
        self.network.require(f"{self.place}.mlp")
        return self.weights.apply(f"{self.place}.mlp.out_proj", self.at("mlp.hook_post"))
