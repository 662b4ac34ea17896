"""Attention: projections, positions, the pattern where somebody watches it, and the write to the stream."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import AlibiPositions, AttentionBackend, BlockConfig, QueryTemperature, RotaryPositions
from hooklens.errors import CacheError
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.spread import Spread
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention.alibi import AlibiTables, fold_into_heads, fold_into_keys
from hooklens.model.attention.attend import (
    attend,
    attend_in_parts,
    compute_pattern,
    compute_scores,
    repeat_heads,
    weigh_values,
)
from hooklens.model.attention.backends import attend_by_flex, attend_by_pattern, make_blocks
from hooklens.model.attention.head_norm import HeadNorm
from hooklens.model.attention.heads import (
    EditedHeads,
    HeadSource,
    join_past,
    own_part,
    project_heads,
    project_own_heads,
    write_own_heads,
)
from hooklens.model.attention.kernels import Part as KeyPart
from hooklens.model.attention.rotary import CosSin, rotary_tables
from hooklens.model.norm import Norm, norm
from hooklens.model.parts.adapted import AdaptedMap
from hooklens.model.parts.declared import When, point, weight
from hooklens.model.parts.part import Part, apply_linear, is_plain
from hooklens.model.plan.positions import TokenPlan
from hooklens.model.plan.visibility import Chunk, Reach
from hooklens.precision import wide_dtype

_PER_HEAD, _PER_KV_HEAD = "batch pos head d_head", "batch pos kv_head d_head"
_ROTARY = When(lambda block: isinstance(block.positions, RotaryPositions), "its positions are not rotary")
_QK_NORMED = When(lambda block: block.qk_norm is not None, "it has no query-key norm")
_SUNK = When(lambda block: block.cfg.attn_sinks, "its attention has no sinks")
_Q_BIASED = When(lambda block: block.has_bias("q"), "its queries have no bias")
_K_BIASED = When(lambda block: block.has_bias("k"), "its keys have no bias")
_V_BIASED = When(lambda block: block.has_bias("v"), "its values have no bias")
_OUT_BIASED = When(lambda block: block.cfg.out_bias, "its attention output has no bias")
_SHARING = When(
    lambda block: block.cfg.n_kv_heads != block.cfg.n_heads,
    "its query heads share no keys and values, so hook_k and hook_v have them per query head",
)


def _weighs_heads(block: BlockConfig) -> bool:
    """Whether the norms of queries and keys have weights for each head."""
    return block.cfg.qk_norm_per_head or block.cfg.qk_norm_over == "all_heads"


_QK_NORM: dict[str, Any] = {
    "kind": lambda block: block.qk_norm,
    "when": _QK_NORMED,
    "n_weighted": lambda block: 2 if _weighs_heads(block) else 1,
    "stand_in": lambda block: HeadNorm if _weighs_heads(block) else None,
}


class Attention(Part, place="blocks.{i}.attn", kind="attention"):
    r"""Multi-head, grouped-query or multi-query attention.

        x -- W_Q -- hook_q -- [q_norm] -- [clip] -- [rotary, hook_rot_q] --\
        x -- W_K -- hook_k -- [k_norm] -- [clip] -- [rotary, hook_rot_k] --- scores - pattern --\
        x -- W_V -- [clip] -- hook_v ------------------------------------------------------- hook_z -- W_O

    The norms may stand behind the rotation (`cfg.qk_norm_after_rotary`). A query temperature acts on what the scores
    read, behind both.

    The fused kernel goes from the three inputs straight to `hook_z`. With a listener on `hook_attn_scores` or
    `hook_pattern` these are computed beside it; `hook_z` is recomputed from the pattern only when a listener
    changed one of them. The same holds for `hook_result` and the output. In training mode with `attn_dropout`
    `hook_z` always comes from the pattern.

    Where query heads share keys and values, `hook_k_per_head` and `hook_v_per_head` show a copy of `hook_k` and
    `hook_v` for each query head. A changed copy goes through the norm and the rotation by itself, and attention
    goes on with keys and values of as many heads as queries.

    Attributes:
        spread: how processes share the heads: projections give this one's, the write to the stream sums over all; None:
            it computes all of them.
        keys_are_whole: where there are fewer key-value heads than processes, each computes all of them.
    """

    can_be_replaced = False

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    W_Q: Float[Tensor, "head d_model d_head"] = weight(
        "head d_model d_head", "(head d_head) d_model", module="q_proj", reads=True, bias="b_Q"
    )
    W_K: Float[Tensor, "kv_head d_model d_head"] = weight(
        "kv_head d_model d_head", "(kv_head d_head) d_model", module="k_proj", reads=True, bias="b_K"
    )
    W_V: Float[Tensor, "kv_head d_model d_head"] = weight(
        "kv_head d_model d_head", "(kv_head d_head) d_model", module="v_proj", reads=True, bias="b_V"
    )
    W_O: Float[Tensor, "head d_head d_model"] = weight(
        "head d_head d_model", "d_model (head d_head)", module="o_proj", writes=True, bias="b_O"
    )
    b_Q: Float[Tensor, "head d_head"] | None = weight("head d_head", "(head d_head)", module="q_proj", when=_Q_BIASED)
    b_K: Float[Tensor, "kv_head d_head"] | None = weight(
        "kv_head d_head", "(kv_head d_head)", module="k_proj", when=_K_BIASED
    )
    b_V: Float[Tensor, "kv_head d_head"] | None = weight(
        "kv_head d_head", "(kv_head d_head)", module="v_proj", when=_V_BIASED
    )
    b_O: Float[Tensor, " d_model"] | None = weight("d_model", module="o_proj", writes=True, when=_OUT_BIASED)
    sinks: nn.Parameter = weight("head", when=_SUNK)
    _pos_embed: nn.Module | None
    spread: Spread | None = None
    keys_are_whole: bool = False

    hook_q: HookPoint = point(_PER_HEAD, "queries, before query-key norm, clipping and rotary")
    hook_k: HookPoint = point(_PER_KV_HEAD, "keys, before query-key norm, clipping and rotary")
    hook_v: HookPoint = point(_PER_KV_HEAD, "values, as attended to and cached")
    hook_k_per_head: HookPoint = point(
        _PER_HEAD,
        "grouped queries: keys before query-key norm and rotary, a copy per query head",
        on_request=True,
        repeats="hook_k",
        when=_SHARING,
    )
    hook_v_per_head: HookPoint = point(
        _PER_HEAD, "grouped queries: values, a copy per query head", on_request=True, repeats="hook_v", when=_SHARING
    )
    q_norm: Norm | None = norm("query norm", axes=_PER_HEAD, **_QK_NORM)
    k_norm: Norm | None = norm("key norm", axes=_PER_KV_HEAD, **_QK_NORM)
    hook_rot_q: HookPoint = point(_PER_HEAD, "queries after rotary", when=_ROTARY)
    hook_rot_k: HookPoint = point(_PER_KV_HEAD, "keys after rotary, as cached where no norm follows", when=_ROTARY)
    hook_attn_scores: HookPoint = point(
        "batch head query key", "scaled, soft-capped and biased scores before the softmax; masked entries are -inf"
    )
    hook_pattern: HookPoint = point(
        "batch head query key",
        "attention pattern; rows sum to 1, with attention sinks to less; fully masked rows are 0",
    )
    hook_z: HookPoint = point(_PER_HEAD, "pattern-weighted values")
    hook_result: HookPoint = point(
        "batch pos head d_model",
        "what each head writes (z W_O); with b_O they sum to the attention output",
        on_request=True,
    )

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        cfg, positions = self.cfg, block.positions
        self.reach: Reach = block.window if block.chunk is None else Chunk(block.chunk)
        self.score_scale, self.dropout = block.score_scale, cfg.attn_dropout
        self.rotary = rotary_tables(positions, cfg.d_head) if isinstance(positions, RotaryPositions) else None
        self.alibi = AlibiTables(positions, cfg, self.score_scale) if isinstance(positions, AlibiPositions) else None
        self.shares_keys = _SHARING.holds(block)
        self.backend: AttentionBackend = cfg.attention_backend
        self.clip = cfg.clip_qkv
        self.norms_last = cfg.qk_norm_after_rotary
        self.temperature = block.query_temperature
        if not cfg.attn_sinks:
            self.register_parameter("sinks", None)
        # Of shortformer positions; past nn.Module's registration, the table is no child of each attention.
        self.__dict__["_pos_embed"] = None

    def read_positions_from(self, pos_embed: nn.Module) -> None:
        """Say which table of positions is added to what queries and keys read."""
        self.__dict__["_pos_embed"] = pos_embed

    def project(
        self, letter: str, x: HeadSource, plan: TokenPlan, call: Call | None = None
    ) -> Float[Tensor, "batch pos heads d_head"]:
        """What enters `hook_q`, `hook_k` or `hook_v`, from the normed stream.

        Args:
            letter: `"q"`, `"k"` or `"v"`.
            x: the normed stream.
            plan: the tokens of the call.
            call: who listens to what adapters beside the map add; None: nobody.
        """
        pos_embed = self._pos_embed
        if pos_embed is not None and letter != "v":
            positions = plan.embedded_positions
            if positions is None:
                positions = plan.remember(pos_embed, partial(pos_embed, positions=plan.positions))
            x = x + (positions if x.ndim == 3 else positions[:, :, None])
        linear = self._modules[f"{letter}_proj"]
        if self.spread is not None and x.ndim == 4 and not (self.keys_are_whole and letter != "q"):
            heads = project_own_heads(self.spread.scatter(x, 2), linear, self.cfg.d_head)
        else:
            heads = project_heads(x, linear, self.cfg.d_head, call)
        return heads.clamp(-self.clip, self.clip) if self.clip is not None and letter == "v" else heads

    def forward(
        self,
        q_input: HeadSource,
        k_input: HeadSource,
        v_input: HeadSource,
        plan: TokenPlan,
        call: Call,
        entry: HookedKeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream.

        Args:
            q_input: the normed stream that queries read, the same for all heads or a copy for each.
            k_input: the same for keys.
            v_input: the same for values.
            plan: the tokens of this call.
            call: who listens.
            entry: this layer's past keys and values, which the new ones are appended to.

        Raises:
            CacheError: keys or values of single query heads were edited, and the entry would store them.
        """
        q = self.hook_q(self.project("q", q_input, plan, call), call)
        k = self.hook_k(self.project("k", k_input, plan, call), call)
        v = self.hook_v(self.project("v", v_input, plan, call), call)
        table = None if self.rotary is None else self.rotary.look_up(plan, q_input.dtype)
        edited = None
        if self.shares_keys and (call.hears(self.hook_k_per_head) or call.hears(self.hook_v_per_head)):
            edited = self._watch_per_head(k, v, table, call, entry)
        if not self.norms_last and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, call), self.k_norm(k, call)
        if self.clip is not None:
            q, k = q.clamp(-self.clip, self.clip), k.clamp(-self.clip, self.clip)
        if self.rotary is not None and table is not None:
            q = self.hook_rot_q(self.rotary.rotate(q, table), call)
            k = self.hook_rot_k(self.rotary.rotate(k, table), call)
        if self.norms_last and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, call), self.k_norm(k, call)
        if self.temperature is not None:
            q = q * self._temperature(self.temperature, plan, q.dtype)
        if edited is not None:
            k, v = edited.take_over(k, v)
            # A frozen entry of no tokens adds nothing.
            entry = entry if entry is not None and len(entry) else None
        if self.spread is not None and entry is not None and not self.keys_are_whole:
            n_own = self.cfg.n_kv_heads // self.spread.n_parts
            entry = entry.hold_heads(self.spread.part * n_own, (self.spread.part + 1) * n_own)
        if entry is not None and (not entry.frozen or not len(entry)):
            k, v = entry.append(k, v)
            entry = None
        if self.keys_are_whole and self.spread is not None:
            k, v, entry = (
                self._own_keys(k, self.spread),
                self._own_keys(v, self.spread),
                self._own_past(entry, self.spread),
            )
        return self._write(self.hook_z(self._attend(q, k, v, plan, call, entry), call), call)

    @property
    def _n_own_heads(self) -> int:
        """The query heads that this process computes."""
        return self.cfg.n_heads if self.spread is None else self.cfg.n_heads // self.spread.n_parts

    def _own_keys(self, x: Tensor, spread: Spread) -> Tensor:
        """Of keys or values of all heads those that the query heads of this process read."""
        n_own = self._n_own_heads
        first = spread.part * n_own
        if x.shape[2] != self.cfg.n_heads:
            # Edited for single query heads there are as many as these; else one that all of these read.
            first, n_own = first * self.cfg.n_kv_heads // self.cfg.n_heads, 1
        return spread.use(x)[:, :, first : first + n_own]

    def _own_past(self, entry: HookedKeyValueCacheEntry | None, spread: Spread) -> HookedKeyValueCacheEntry | None:
        """The same of a frozen past."""
        if entry is None:
            return None
        first = spread.part * self.cfg.n_kv_heads // spread.n_parts
        return entry.hold_heads(first, first + 1)

    def _own_sinks(self) -> Tensor | None:
        """The sinks of the heads that this process computes, where several share them."""
        own: Tensor | None = own_part(self._parameters["sinks"])
        return own

    def _watch_per_head(
        self, k: Tensor, v: Tensor, table: CosSin | None, call: Call, entry: HookedKeyValueCacheEntry | None
    ) -> "EditedHeads | None":
        """What listeners made of the keys and values that query heads read; None where they changed neither."""
        n_heads, keys, values = self.cfg.n_heads if self.keys_are_whole else self._n_own_heads, None, None
        if self.hook_k_per_head.listens(call):
            copies, changed = self.hook_k_per_head.watch(repeat_heads(k, n_heads), call)
            if changed:
                keys = self._place_keys(copies, table, call)
        if self.hook_v_per_head.listens(call):
            copies, changed = self.hook_v_per_head.watch(repeat_heads(v, n_heads), call)
            if changed:
                values = copies
        if keys is None and values is None:
            return None
        if entry is not None and not entry.frozen:
            points = ((self.hook_k_per_head, keys), (self.hook_v_per_head, values))
            edited = next(point.describe(heads) for point, heads in points if heads is not None)
            raise CacheError(
                f"{edited} was edited (or asked for gradients) in a call that appends to a key-value "
                f"cache; the cache keeps one key and value for each of {self.cfg.n_kv_heads} key-value heads, so later "
                "calls would read them without the edit. Run the whole sequence without a cache (past_kv_cache=None, "
                "in generate use_past_kv_cache=False) or on a frozen one, or edit the key-value head at hook_k or "
                "hook_v"
            )
        plain = None
        if keys is not None and self._hooks_behind_keys(call):
            plain = self._place_keys(k, table, call)
        return EditedHeads(keys, values, plain)

    def _hooks_behind_keys(self, call: Call) -> bool:
        """Whether somebody listens between `hook_k` and the scores."""
        in_norm = self.k_norm is not None and self.k_norm.listens(call)
        return in_norm or (self.rotary is not None and self.hook_rot_k.listens(call))

    def _place_keys(self, k: Tensor, table: CosSin | None, call: Call) -> Tensor:
        """Keys after norm and rotation, whose hook points do not fire."""
        if self.k_norm is not None and not self.norms_last:
            k = self.k_norm.apply_beside(k, call)
        if self.clip is not None:
            k = k.clamp(-self.clip, self.clip)
        if self.rotary is not None and table is not None:
            k = self.rotary.rotate(k, table)
        return self.k_norm.apply_beside(k, call) if self.k_norm is not None and self.norms_last else k

    @staticmethod
    def _temperature(
        kind: QueryTemperature, plan: TokenPlan, dtype: torch.dtype
    ) -> Float[Tensor, "rows pos one another"]:
        """The factor on the query of each column."""

        def make() -> Tensor:
            steps = (plan.positions + kind.offset) // kind.length
            return (1 + kind.scale * torch.log1p(steps.to(wide_dtype(dtype)))).to(dtype)[..., None, None]

        return plan.remember((kind, dtype), make)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: TokenPlan,
        call: Call,
        frozen: HookedKeyValueCacheEntry | None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Pattern-weighted values; with a frozen entry `k` and `v` are the new tokens' only."""
        drops = self.dropout > 0 and self.training
        if drops or call.hears(self.hook_attn_scores) or call.hears(self.hook_pattern):
            all_k, all_v = (k, v) if frozen is None else join_past(frozen, k, v)
            pattern, changed = self._watch_pattern(q, all_k, plan, call, drops=drops)
            if changed or drops:
                return weigh_values(pattern, all_v)
        if self.backend in ("explicit", "flex"):
            return self._attend_by_backend(q, *((k, v) if frozen is None else join_past(frozen, k, v)), plan)
        if frozen is not None and self.backend == "sdpa":
            k, v = join_past(frozen, k, v)
        elif frozen is not None:
            return self._attend_in_parts(q, k, v, plan, frozen)
        sight = plan.sight(self.reach, q.dtype)
        if self.alibi is not None:
            q, k, v = fold_into_heads(q, k, v, self.alibi.entries(plan, plan.keys, q.dtype))
        sinks = self._parameters["sinks"] if self.spread is None else self._own_sinks()
        z = attend(
            q,
            k,
            v,
            score_scale=self.score_scale,
            mask=sight.mask,
            is_causal=sight.is_causal,
            softcap=self.cfg.attn_softcap,
            sinks=sinks,
        )
        return z if self.alibi is None else z[..., : self.cfg.d_head]

    def _attend_by_backend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Attention the one way that the config asks for."""
        sight = plan.visibility(self.reach).sight(plan.keys, q.dtype, explicit=True)
        term = None if self.alibi is None else self.alibi.term(plan, q.dtype)
        sinks = self._parameters["sinks"] if self.spread is None else self._own_sinks()
        options: dict[str, Any] = {
            "score_scale": self.score_scale,
            "softcap": self.cfg.attn_softcap,
            "term": term,
            "sinks": sinks,
        }
        if self.backend == "explicit":
            return attend_by_pattern(q, k, v, sight=sight, **options)
        blocks = None
        if sight.mask is not None:
            blocks = plan.remember(("flex", self.reach, q.dtype), make_blocks, sight.mask, plan.n_new)
        return attend_by_flex(q, k, v, blocks=blocks, **options)

    def _attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan, frozen: HookedKeyValueCacheEntry
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Attention over a frozen past and over the new tokens, put together; the past is not copied.

        A past of one row serves all rows of the batch.
        """
        past_k, past_v = frozen.past_keys, frozen.past_values
        visibility = plan.visibility(self.reach)
        past = visibility.sight(plan.past, q.dtype, fold_rows=len(q) if len(past_k) == 1 and len(q) > 1 else None)
        new = visibility.sight(plan.new, q.dtype)
        if self.alibi is not None:
            past_k, past_v = fold_into_keys(
                past_k, past_v, self.alibi.entries(plan, plan.past, q.dtype, n_rows=len(past_k))
            )
            q, k, v = fold_into_heads(q, k, v, self.alibi.entries(plan, plan.new, q.dtype))
        parts = [KeyPart(past_k, past_v, past.mask), KeyPart(k, v, new.mask, new.is_causal)]
        sinks = self._parameters["sinks"] if self.spread is None else self._own_sinks()
        z = attend_in_parts(q, parts, score_scale=self.score_scale, softcap=self.cfg.attn_softcap, sinks=sinks)
        return z if self.alibi is None else z[..., : self.cfg.d_head]

    def _watch_pattern(self, q: Tensor, k: Tensor, plan: TokenPlan, call: Call, *, drops: bool) -> tuple[Tensor, bool]:
        """The pattern as listeners leave it, and whether they changed the scores or it.

        Dropout is drawn here, whoever listens, so that the pattern that is shown is the one that is used.
        """
        sight = plan.visibility(self.reach).sight(plan.keys, q.dtype, explicit=True)
        scores = compute_scores(
            q,
            k,
            score_scale=self.score_scale,
            term=None if self.alibi is None else self.alibi.term(plan, q.dtype),
            softcap=self.cfg.attn_softcap,
            mask=sight.mask,
        )
        scores_changed = False
        if call.hears(self.hook_attn_scores):
            scores, scores_changed = self.hook_attn_scores.watch(scores, call)
        watched = call.hears(self.hook_pattern)
        if not (scores_changed or watched or drops):
            return scores, False
        can_hide_all, pattern_changed = sight.can_hide_all or scores_changed, False
        sinks = self._parameters["sinks"] if self.spread is None else self._own_sinks()
        pattern = compute_pattern(scores, can_hide_all=can_hide_all, sinks=sinks)
        if drops:
            pattern = F.dropout(pattern, self.dropout)
        if watched:
            pattern, pattern_changed = self.hook_pattern.watch(pattern, call)
        return pattern, scores_changed or pattern_changed

    def _write(self, z: Float[Tensor, "batch pos head d_head"], call: Call) -> Float[Tensor, "batch pos d_model"]:
        o_proj = self._modules["o_proj"]
        assert o_proj is not None
        if call.hears(self.hook_result):
            result, bias = self._results(z, o_proj)
            result, changed = self.hook_result.watch(result, call)
            if changed:
                summed = result.sum(2)
                summed = summed if bias is None else summed + bias
                if isinstance(o_proj, AdaptedMap) and o_proj.listens(call):
                    # Who changed what adapters add did so beside the heads: the change counts, too.
                    summed = summed + o_proj.change_by_listeners(z.flatten(2), call)
                return summed
        return apply_linear(o_proj, z.flatten(2), call)

    def _results(
        self, z: Tensor, o_proj: nn.Module
    ) -> tuple[Float[Tensor, "batch pos head d_model"], Float[Tensor, "..."] | None]:
        """What each head writes, and the bias that is added to their sum."""
        if self.spread is not None:
            # Whole from here on: their sum is over the heads of all processes.
            return self.spread.gather(write_own_heads(z, o_proj), 2), own_part(o_proj._parameters["bias"])
        if is_plain(o_proj):
            return torch.einsum("bpnh,nhm->bpnm", z, self.W_O), self.b_O
        # Whatever stands there is linear: what it makes of one head alone, less what it makes of nothing.
        alone = torch.diag_embed(z.transpose(2, 3)).permute(0, 1, 3, 4, 2)
        bias: Tensor = o_proj(torch.zeros_like(z[:1, :1]).flatten(2))
        return o_proj(alone.flatten(3)) - bias[:, :, None], bias
