"""A slow and plain transformer to compare with: one row at a time, no padding, no masks, no cache, float64.

A row is its real tokens. Attention is a loop over heads and queries, each with the list of the keys that it sees; what
it does not see is never computed, so no mask can hide a wrong number and no gradient can be NaN by one. Weights come
from `model.named_weights()`, under the field's names.

A row is a generator that gives `(name, value)` at every hook point and goes on from what it is sent. So edits are plain
functions of the values, and `Reference.run` drives all rows in step, because the mean over a batch needs all of them.

Values are `[pos ...]`; attention scores and patterns are lists `[head][query]` of vectors over the keys in sight.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.config import (
    AlibiPositions,
    LearnedPositions,
    MoEConfig,
    NormConfig,
    QueryTemperature,
    RotaryPositions,
    ShortformerPositions,
    SinusoidalPositions,
)

Value = Tensor | list[list[Tensor]]
Steps = Generator[tuple[str, Value], Any, Any]
Place = tuple[int, int, int | None]
"""Row, position, and head where the value has heads."""
Cells = dict[Place, Tensor]


@dataclass(frozen=True)
class PlainEdit:
    """What becomes of some cells of the values at a hook point.

    Attributes:
        name: the hook point.
        places: pairs (row, position).
        heads: of each; None: all, or the value has none.
        change: from the cells to their new values.
    """

    name: str
    places: list[tuple[int, int]]
    heads: list[int] | None
    change: Callable[[Cells], Cells]

    def apply(self, values: list[Value]) -> list[Value]:
        grids = [_to_cells(value) for value in values]
        cells: Cells = {}
        for row, position in self.places:
            here = grids[row][position]
            if isinstance(here, Tensor):
                cells[row, position, None] = here
            else:
                for head in range(len(here)) if self.heads is None else self.heads:
                    cells[row, position, head] = here[head]
        for (row, position, head), cell in (self.change(cells) if cells else {}).items():
            if head is None:
                grids[row][position] = cell
            else:
                grids[row][position][head] = cell
        return [_from_cells(grid, value) for grid, value in zip(grids, values, strict=True)]


def _to_cells(value: Value) -> list[Any]:
    """A value as a list over positions of vectors, or of lists over heads of vectors."""
    if isinstance(value, list):
        return [list(heads) for heads in zip(*value, strict=True)]
    return [list(here) if here.ndim > 1 else here for here in value]


def _from_cells(grid: list[Any], like: Value) -> Value:
    if isinstance(like, list):
        return [list(queries) for queries in zip(*grid, strict=True)]
    return torch.stack([here if isinstance(here, Tensor) else torch.stack(here) for here in grid])


@dataclass
class Outcome:
    """What a row gave: logits `[pos d_vocab]`, and the value at every hook point, in order."""

    logits: Tensor
    values: dict[str, Value]


class Reference:
    """The plain network with a model's configuration and a copy of its weights, of which gradients are wanted."""

    def __init__(self, model: HookedCausalLM) -> None:
        self.cfg = model.cfg
        self.weights = {
            name: weight.detach().clone().double().requires_grad_()
            for name, weight in model.named_weights().items()
            if not (model.cfg.tied_unembed and name == "unembed.W_U")
        }

    def run(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[Sequence[int]] | None = None,
        n_frozen: Sequence[int] | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        edits: Sequence[PlainEdit] = (),
    ) -> list[Outcome]:
        """Run rows of tokens.

        Args:
            rows: real tokens of each row.
            positions: of each token; None: 0, 1, 2, ...
            n_frozen: how many tokens of each row are given: no gradient goes through their keys and values.
            documents: a number for each token; None: rows are one document each.
            edits: in the order in which they act.
        """
        self._documents = [[0] * len(row) for row in rows] if documents is None else documents
        running = [
            self._run_row(
                i,
                list(row),
                list(range(len(row))) if positions is None else list(positions[i]),
                0 if n_frozen is None else n_frozen[i],
            )
            for i, row in enumerate(rows)
        ]
        records: list[dict[str, Value]] = [{} for _ in rows]
        asked = [next(row) for row in running]
        while True:
            (name,) = {name for name, _ in asked}
            values = [value for _, value in asked]
            for edit in edits:
                if edit.name == name:
                    values = edit.apply(values)
            values = [_own(value) for value in values]
            for record, value in zip(records, values, strict=True):
                record[name] = value
            asked, ended = [], []
            for row, value in zip(running, values, strict=True):
                try:
                    asked.append(row.send(value))
                except StopIteration as end:
                    ended.append(end.value)
            if ended:
                assert not asked
                return [Outcome(logits, record) for logits, record in zip(ended, records, strict=True)]

    def sees(self, layer: int, row: int, positions: Sequence[int], query: int) -> list[int]:
        """The keys that a query of the last run sees: of its document, none later and none that lies too far off.

        Without causality later ones, too.
        """
        window = self.cfg.windows[layer] if self.cfg.windows is not None else None
        chunk = self.cfg.chunks[layer] if self.cfg.chunks is not None else None
        document = self._documents[row]

        def is_near(key: int) -> bool:
            ahead = positions[key] - positions[query]
            if chunk is not None and positions[key] // chunk != positions[query] // chunk:
                return False
            return window is None or (-window < ahead and (self.cfg.causal or ahead < window))

        keys = range(query + 1 if self.cfg.causal else len(positions))
        shared = not self.cfg.document_mask
        return [key for key in keys if (shared or document[key] == document[query]) and is_near(key)]

    def _weight(self, name: str) -> Tensor:
        if self.cfg.tied_unembed and name == "unembed.W_U":
            return self.weights["embed.W_E"].T
        return self.weights[name]

    def _bias(self, name: str) -> Tensor | float:
        return self.weights.get(name, 0.0)

    def _run_row(self, row: int, tokens: list[int], positions: list[int], n_frozen: int) -> Steps:
        cfg = self.cfg
        x = torch.stack([self._weight("embed.W_E")[token] for token in tokens])
        if cfg.embed_scale is not None:
            x = x * cfg.embed_scale
        if cfg.d_embed is not None:
            x = x @ self._weight("embed.W_proj_in")
        if cfg.embed_norm is not None:
            x = yield from self._norm("embed.ln", cfg.embed_norm, x)
        x = yield "hook_embed", x
        in_heads = 0.0
        if isinstance(cfg.positions, LearnedPositions | ShortformerPositions):
            table, offset = self._weight("pos_embed.W_pos"), cfg.positions.offset
            placed = yield "hook_pos_embed", torch.stack([table[offset + position] for position in positions])
            if isinstance(cfg.positions, LearnedPositions):
                x = x + placed
            else:
                in_heads = placed
        elif isinstance(cfg.positions, SinusoidalPositions):
            x = x + (yield "hook_pos_embed", _waves(cfg.positions, cfg.d_model, positions))
        for layer in range(cfg.n_layers):
            x = yield from self._run_block(layer, row, x, positions, n_frozen, in_heads)
        if cfg.final_norm is not None:
            x = yield from self._norm("ln_final", cfg.final_norm, x)
        x = yield "unembed.hook_in", x
        if cfg.d_embed is not None:
            x = x @ self._weight("unembed.W_proj_out")
        logits = (x @ self._weight("unembed.W_U") + self._bias("unembed.b_U")) * cfg.logits_scale
        logits = yield "unembed.hook_out", logits
        return logits if cfg.logits_softcap is None else cfg.logits_softcap * torch.tanh(logits / cfg.logits_softcap)

    def _norm(self, name: str, norm: NormConfig, x: Tensor) -> Steps:
        scale = yield f"{name}.hook_scale", self._scale(name, norm, x)
        normalized = yield f"{name}.hook_normalized", self._centre(name, norm, x) / scale
        return self._weigh(name, norm, normalized)

    def _plain_norm(self, name: str, norm: NormConfig, x: Tensor) -> Tensor:
        return self._weigh(name, norm, self._centre(name, norm, x) / self._scale(name, norm, x))

    def _mean(self, name: str, x: Tensor) -> Tensor:
        """What a norm takes the mean over: each vector's entries, or those of all heads at a position."""
        if ".attn." not in name or self.cfg.qk_norm_over == "head":
            return x.mean(-1, keepdim=True)
        return torch.stack([torch.full_like(here[:, :1], 1.0) * here.flatten().mean() for here in x])

    def _centre(self, name: str, norm: NormConfig, x: Tensor) -> Tensor:
        return x - self._mean(name, x) if norm.kind == "layer" else x

    def _scale(self, name: str, norm: NormConfig, x: Tensor) -> Tensor:
        return (self._mean(name, self._centre(name, norm, x).square()) + norm.eps).sqrt()

    def _weigh(self, name: str, norm: NormConfig, normalized: Tensor) -> Tensor:
        gain = self._weight(f"{name}.w") if norm.weight else torch.ones(())
        bias = self.weights.get(f"{name}.b", torch.zeros(()))
        if ".attn." in name and (self.cfg.qk_norm_per_head or self.cfg.qk_norm_over == "all_heads"):
            # Copies of keys for each query head have the weights of their key-value head.
            gain, bias = (
                one if one.ndim < 2 else one.repeat_interleave(normalized.shape[1] // len(one), 0)
                for one in (gain, bias)
            )
        return normalized * (1 + gain if norm.unit_offset else gain) + bias

    def _run_block(
        self, layer: int, row: int, x: Tensor, positions: list[int], n_frozen: int, in_heads: Tensor | float
    ) -> Steps:
        cfg, name = self.cfg, f"blocks.{layer}"
        attends, has_mlp = of_layer(cfg.attn, layer) is not None, of_layer(cfg.mlp, layer) is not None
        norm = of_layer(cfg.norm, layer)
        before, after = (norm is not None and of_layer(flag, layer) for flag in (cfg.norm_before, cfg.norm_after))
        resid = out = yield f"{name}.hook_resid_pre", x
        normed, inputs = resid, []
        if attends:
            per_head = yield f"{name}.hook_attn_in", torch.stack([resid] * cfg.n_heads, 1)
            by_group = torch.stack([group.mean(1) for group in per_head.chunk(cfg.n_kv_heads, 1)], 1)
            for letter, copies in (("q", per_head), ("k", by_group), ("v", by_group)):
                inputs.append((yield f"{name}.hook_{letter}_input", copies))
        if before and (attends or (cfg.shared_norm and has_mlp)):
            normed = yield from self._norm(f"{name}.ln1", norm, resid)
            inputs = [self._norm_copy(f"{name}.ln1", norm, copies, resid, normed) for copies in inputs]
        if attends:
            if isinstance(in_heads, Tensor):
                inputs[:2] = [copies + in_heads[:, None] for copies in inputs[:2]]
            attn_out = yield from self._attend(layer, row, inputs, positions, n_frozen)
            if after:
                attn_out = yield from self._norm(f"{name}.ln1_post", norm, attn_out)
            out = yield from self._add(f"{name}.hook_attn_out", out, attn_out, f"{name}.ln1_stream", norm)
        if has_mlp:
            mid = resid
            if cfg.wiring == "sequential":
                if attends:
                    out = yield f"{name}.hook_resid_mid", out
                mid = out
            mlp_in = yield f"{name}.hook_mlp_in", mid
            if before and cfg.shared_norm:
                mlp_in = self._norm_copy(f"{name}.ln1", norm, mlp_in, resid, normed)
            elif before:
                mlp_in = yield from self._norm(f"{name}.ln2", norm, mlp_in)
            is_mixture = isinstance(of_layer(cfg.mlp, layer), MoEConfig)
            mlp_out = self._mix(f"{name}.mlp", mlp_in) if is_mixture else (yield from self._mlp(f"{name}.mlp", mlp_in))
            if after:
                mlp_out = yield from self._norm(f"{name}.ln2_post", norm, mlp_out)
            out = yield from self._add(f"{name}.hook_mlp_out", out, mlp_out, f"{name}.ln2_stream", norm)
        return (yield f"{name}.hook_resid_post", out)

    def _add(self, point: str, stream: Tensor, out: Tensor, ln: str, norm: NormConfig) -> Steps:
        stream = stream + (yield point, out * self.cfg.residual_scale)
        return (yield from self._norm(ln, norm, stream)) if self.cfg.norm_stream else stream

    def _norm_copy(self, name: str, norm: NormConfig, copies: Tensor, resid: Tensor, normed: Tensor) -> Tensor:
        """The norm of a copy of the stream, and what was done inside the norm of the stream itself."""
        done = normed - self._plain_norm(name, norm, resid)
        return self._plain_norm(name, norm, copies) + (done[:, None] if copies.ndim == 3 else done)

    def _mlp(self, name: str, x: Tensor) -> Steps:
        act, is_clamped = self._activation(name), self.cfg.act_fn == "clamped_swiglu"
        linear = x @ self._weight(f"{name}.W_in") + self._bias(f"{name}.b_in")
        if self.cfg.gated_mlp:
            gate = yield f"{name}.hook_pre", x @ self._weight(f"{name}.W_gate") + self._bias(f"{name}.b_gate")
            linear = yield f"{name}.hook_pre_linear", linear
            post = act(gate) * (
                linear.clamp(-self.cfg.swiglu_limit, self.cfg.swiglu_limit) + 1 if is_clamped else linear
            )
        else:
            post = act((yield f"{name}.hook_pre", linear))
        if self.cfg.act_norm is not None:
            post = yield f"{name}.hook_mid", post
            post = yield from self._norm(f"{name}.ln", self.cfg.act_norm, post)
        post = yield f"{name}.hook_post", post
        return post @ self._weight(f"{name}.W_out") + self._bias(f"{name}.b_out")

    def _activation(self, name: str) -> Callable[[Tensor], Tensor]:
        cfg = self.cfg
        if cfg.act_fn == "xielu":
            curves = [torch.log1p(self._weight(f"{name}.alpha_{side}").exp()) for side in "pn"]
            return lambda x: (
                x / 2 + torch.where(x > 0, curves[0] * x**2, (0.5 + curves[1]) * (x.clamp(max=-1e-6).exp() - 1 - x))
            )
        if cfg.act_fn == "clamped_swiglu":
            return lambda x: (
                x.clamp(max=cfg.swiglu_limit) * torch.sigmoid(cfg.swiglu_alpha * x.clamp(max=cfg.swiglu_limit))
            )
        return _ACTIVATIONS[cfg.act_fn]

    def _mix(self, name: str, x: Tensor) -> Tensor:
        """The mixture that cases draw, one token after another; what its own points show is tested beside the part."""
        out = []
        for token in x:
            logits = token @ self._weight(f"{name}.W_router") + self._weight(f"{name}.b_router")
            chosen = logits.topk(2).indices.tolist()
            gates = logits[chosen].exp() / logits[chosen].exp().sum()
            made = self._expert(f"{name}.shared", token, ...)
            out.append(made + sum(g * self._expert(name, token, e) for g, e in zip(gates, chosen, strict=True)))
        return torch.stack(out)

    def _expert(self, name: str, token: Tensor, which: Any) -> Tensor:
        gate, linear = (token @ self._weight(f"{name}.W_{i}")[which] + self._weight(f"{name}.b_{i}")[which]
                        for i in ("gate", "in"))  # fmt: skip
        post = gate / (1 + (-gate).exp()) * linear
        return post @ self._weight(f"{name}.W_out")[which] + self._weight(f"{name}.b_out")[which]

    def _attend(self, layer: int, row: int, inputs: list[Tensor], positions: list[int], n_frozen: int) -> Steps:
        cfg, name = self.cfg, f"blocks.{layer}.attn"
        kind, qk_norm = of_layer(cfg.positions, layer), of_layer(cfg.qk_norm, layer)
        made = []
        for letter, copies in zip("QKV", inputs, strict=True):
            weight, bias = self._weight(f"{name}.W_{letter}"), self._bias(f"{name}.b_{letter}")
            heads = torch.stack([copies[:, head] @ weight[head] for head in range(len(weight))], 1) + bias
            if letter == "V":
                heads = self._clip(heads)
            made.append((yield f"{name}.hook_{letter.lower()}", heads))
        q, k, v = made
        group = cfg.n_heads // cfg.n_kv_heads
        k_copies, v_copies = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if group > 1:
            k_copies = yield f"{name}.hook_k_per_head", k_copies
            v_copies = yield f"{name}.hook_v_per_head", v_copies
        placed = k
        if qk_norm is not None and not cfg.qk_norm_after_rotary:
            q = yield from self._norm(f"{name}.q_norm", qk_norm, q)
            placed = yield from self._norm(f"{name}.k_norm", qk_norm, placed)
        q, placed = self._clip(q), self._clip(placed)
        if isinstance(kind, RotaryPositions):
            q = yield f"{name}.hook_rot_q", _rotate(kind, q, positions)
            placed = yield f"{name}.hook_rot_k", _rotate(kind, placed, positions)
        if qk_norm is not None and cfg.qk_norm_after_rotary:
            q = yield from self._norm(f"{name}.q_norm", qk_norm, q)
            placed = yield from self._norm(f"{name}.k_norm", qk_norm, placed)
        done = (placed - self._place_keys(name, kind, qk_norm, k, positions)).repeat_interleave(group, 1)
        keys = self._place_keys(name, kind, qk_norm, k_copies, positions) + done
        temperature = of_layer(cfg.query_temperature, layer)
        if temperature is not None:
            q = torch.stack(
                [_heat(temperature, position) * vector for vector, position in zip(q, positions, strict=True)]
            )
        keys = torch.cat([keys[:n_frozen].detach(), keys[n_frozen:]])
        values = torch.cat([v_copies[:n_frozen].detach(), v_copies[n_frozen:]])
        seen = [self.sees(layer, row, positions, query) for query in range(len(positions))]
        scores = [
            [
                self._scores(layer, kind, head, q[query, head], keys[:, head], seen[query], positions)
                for query in range(len(q))
            ]
            for head in range(cfg.n_heads)
        ]
        scores = yield f"{name}.hook_attn_scores", scores
        sinks = self.weights.get(f"{name}.sinks", [None] * cfg.n_heads)
        pattern = yield (
            f"{name}.hook_pattern",
            [[_softmax(row, sink) for row in queries] for queries, sink in zip(scores, sinks, strict=True)],
        )
        z = torch.stack(
            [
                torch.stack(
                    [
                        sum(
                            weight * values[key, head]
                            for weight, key in zip(pattern[head][query], keys_seen, strict=True)
                        )
                        for head in range(cfg.n_heads)
                    ]
                )
                for query, keys_seen in enumerate(seen)
            ]
        )
        z = yield f"{name}.hook_z", z
        result = torch.stack([z[:, head] @ self._weight(f"{name}.W_O")[head] for head in range(cfg.n_heads)], 1)
        result = yield f"{name}.hook_result", result
        return result.sum(1) + self._bias(f"{name}.b_O")

    def _place_keys(
        self, name: str, kind: object, qk_norm: NormConfig | None, k: Tensor, positions: list[int]
    ) -> Tensor:
        norm_last = self.cfg.qk_norm_after_rotary
        if qk_norm is not None and not norm_last:
            k = self._plain_norm(f"{name}.k_norm", qk_norm, k)
        k = self._clip(k)
        if isinstance(kind, RotaryPositions):
            k = _rotate(kind, k, positions)
        return self._plain_norm(f"{name}.k_norm", qk_norm, k) if qk_norm is not None and norm_last else k

    def _clip(self, heads: Tensor) -> Tensor:
        limit = self.cfg.clip_qkv
        return heads if limit is None else torch.where(heads > limit, limit, torch.where(heads < -limit, -limit, heads))

    def _scores(
        self, layer: int, kind: object, head: int, query: Tensor, keys: Tensor, seen: list[int], positions: list[int]
    ) -> Tensor:
        given = of_layer(self.cfg.attn_scale, layer)
        scale = self.cfg.d_head**-0.5 if given is None else given
        scores = []
        for key in seen:
            score = query.dot(keys[key]) * scale
            if isinstance(kind, AlibiPositions):
                bias = _slope(head, self.cfg.n_heads) * positions[key]
                score = score + (bias * scale if kind.scaled else bias)
            scores.append(score)
        row, cap = torch.stack(scores), self.cfg.attn_softcap
        return row if cap is None else cap * torch.tanh(row / cap)


def of_layer(value: Any, layer: int) -> Any:
    """What a field of a configuration says of a layer."""
    return value[layer] if isinstance(value, tuple) else value


def _softmax(row: Tensor, sink: Tensor | None = None) -> Tensor:
    """The softmax of a row of scores; a sink takes part in it and is left out."""
    row = row if sink is None else torch.cat([row, sink[None]])
    grown = (row - row.max().detach()).exp()
    return (grown / grown.sum())[: len(row) - (sink is not None)]


def _heat(kind: QueryTemperature, position: int) -> float:
    return 1 + kind.scale * math.log(1 + (position + kind.offset) // kind.length)


def _waves(kind: SinusoidalPositions, d_model: int, positions: list[int]) -> Tensor:
    """Sines and cosines; angles are float32 numbers, as models are trained with."""
    half = d_model // 2
    frequencies = torch.exp(torch.arange(half).float() * (-math.log(kind.base) / (half - kind.includes_base)))
    rows = []
    for position in positions:
        angles = torch.tensor(float(position + kind.offset)) * frequencies
        pairs = [angles.sin(), angles.cos()]
        rows.append(torch.cat(pairs) if kind.layout == "half" else torch.stack(pairs, 1).flatten())
    return torch.stack(rows).double()


def _slope(head: int, n_heads: int) -> float:
    """The slope of a head (Press et al. 2022); the tests have powers of two only."""
    assert n_heads & (n_heads - 1) == 0
    return 2.0 ** (-8 * (head + 1) / n_heads)


def _rotate(kind: RotaryPositions, heads: Tensor, positions: list[int]) -> Tensor:
    """Turn pairs of entries; angles are float32 numbers, as models are trained with."""
    half = kind.dim // 2
    frequencies = 1.0 / kind.base ** (torch.arange(0, kind.dim, 2).float() / kind.dim)
    amplitude = 1.0
    if kind.scaling is not None and kind.scaling.kind == "longrope":
        # Past the original length a row's own length decides, which has tests of its own.
        assert kind.scaling.original_n_ctx is not None
        assert max(positions, default=0) < kind.scaling.original_n_ctx
        stretch = torch.tensor(kind.scaling.short_factors)
        frequencies = 1.0 / (stretch * kind.base ** (torch.arange(0, kind.dim, 2).float() / kind.dim))
        amplitude = kind.scaling.attention_factor
    elif kind.scaling is not None:
        assert kind.scaling.kind == "linear"
        frequencies = frequencies / kind.scaling.factor
    turned = []
    for vectors, position in zip(heads, positions, strict=True):
        angles = torch.tensor(float(position)) * frequencies
        entries = list(vectors.unbind(-1))
        for pair in range(half):
            one, other = (pair, pair + half) if kind.layout == "half" else (2 * pair, 2 * pair + 1)
            cos, sin = (angles[pair].cos() * amplitude).double(), (angles[pair].sin() * amplitude).double()
            a, b = vectors[:, one], vectors[:, other]
            entries[one], entries[other] = a * cos - b * sin, b * cos + a * sin
        turned.append(torch.stack(entries, -1))
    return torch.stack(turned)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "solu": lambda x: x * x.exp() / x.exp().sum(-1, keepdim=True),
    "solu_ln": lambda x: x * x.exp() / x.exp().sum(-1, keepdim=True),
    "identity": lambda x: x,
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


def _own(value: Value) -> Value:
    """The same in a tensor of its own, at which a gradient can be asked for."""
    if isinstance(value, list):
        return [[_own(row) for row in queries] for queries in value]
    return value.clone() if value.requires_grad else value.detach().clone().requires_grad_(torch.is_grad_enabled())


def gradients(loss: Tensor, value: Value) -> Value:
    """The gradient of a loss at a hook point's value, 0 where it does not depend on it."""
    flat = [value] if isinstance(value, Tensor) else [row for queries in value for row in queries]
    found = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(at) if one is None else one for at, one in zip(flat, found, strict=True)]
    if isinstance(value, Tensor):
        return filled[0]
    numbers = iter(filled)
    return [[next(numbers) for _ in queries] for queries in value]


def as_field(name: str, stored: Tensor, shape: torch.Size) -> Tensor:
    """What belongs to a parameter (`[out, in]`, of experts stacked) in the shape of the weight of the field's name."""
    letter = name.rpartition(".")[2]
    if letter in ("W_Q", "W_K", "W_V"):
        heads, d_model, d_head = shape
        return stored.view(heads, d_head, d_model).transpose(1, 2)
    if letter == "W_O":
        heads, d_head, d_model = shape
        return stored.T.reshape(heads, d_head, d_model)
    if letter in ("W_in", "W_gate", "W_out", "W_U", "W_proj_in", "W_proj_out", "W_router") and len(shape) > 1:
        return stored.mT
    return stored.reshape(shape)
