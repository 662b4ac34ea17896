"""Attention: projections, positions, the pattern where somebody watches it, and the write to the stream."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import AlibiPositions, BlockConfig, RotaryPositions
from hooklens.errors import CacheError
from hooklens.hooks import Call, HookPoint
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.alibi import (
    AlibiEntries,
    alibi_slopes,
    alibi_term,
    fold_into_heads,
    fold_into_keys,
    make_alibi_entries,
)
from hooklens.model.attend import (
    attend,
    attend_in_parts,
    compute_pattern,
    compute_scores,
    repeat_heads,
    weigh_values,
)
from hooklens.model.declared import When, point, weight
from hooklens.model.kernels import Part as KeyPart
from hooklens.model.norm import Norm, norm
from hooklens.model.part import Part, apply_linear, is_plain
from hooklens.model.positions import TokenPlan
from hooklens.model.rotary import CosSin, rotary_tables

# The normed stream, the same for all heads or (edited per head) a copy for each.
HeadInput = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos _ d_model"]

_PER_HEAD, _PER_KV_HEAD = "batch pos head d_head", "batch pos kv_head d_head"
_ROTARY = When(lambda block: isinstance(block.positions, RotaryPositions), "its positions are not rotary")
_QK_NORMED = When(lambda block: block.qk_norm is not None, "it has no query-key norm")
_BIASED = When(lambda block: block.cfg.qkv_bias, "its queries, keys and values have no biases")
_OUT_BIASED = When(lambda block: block.cfg.out_bias, "its attention output has no bias")
_SHARING = When(
    lambda block: block.cfg.n_kv_heads != block.cfg.n_heads,
    "its query heads share no keys and values, so hook_k and hook_v have them per query head",
)


class Attention(Part, place="blocks.{i}.attn", kind="attention"):
    r"""Multi-head, grouped-query or multi-query attention.

        x -- W_Q -- hook_q -- [q_norm] -- [rotary, hook_rot_q] --\
        x -- W_K -- hook_k -- [k_norm] -- [rotary, hook_rot_k] --- scores - pattern --\
        x -- W_V -- hook_v --------------------------------------------------------- hook_z -- W_O

    The fused kernel goes from the three inputs straight to `hook_z`. With a listener on `hook_attn_scores` or
    `hook_pattern` these are computed beside it; `hook_z` is recomputed from the pattern only when a listener
    changed one of them. The same holds for `hook_result` and the output.

    Where query heads share keys and values, `hook_k_per_head` and `hook_v_per_head` show a copy of `hook_k` and
    `hook_v` for each query head. A changed copy goes through the norm and the rotation by itself, and attention
    goes on with keys and values of as many heads as queries.
    """

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
    b_Q: Float[Tensor, "head d_head"] | None = weight("head d_head", "(head d_head)", module="q_proj", when=_BIASED)
    b_K: Float[Tensor, "kv_head d_head"] | None = weight(
        "kv_head d_head", "(kv_head d_head)", module="k_proj", when=_BIASED
    )
    b_V: Float[Tensor, "kv_head d_head"] | None = weight(
        "kv_head d_head", "(kv_head d_head)", module="v_proj", when=_BIASED
    )
    b_O: Float[Tensor, " d_model"] | None = weight("d_model", module="o_proj", writes=True, when=_OUT_BIASED)

    hook_q: HookPoint = point(_PER_HEAD, "queries, before query-key norm and rotary")
    hook_k: HookPoint = point(_PER_KV_HEAD, "keys, before query-key norm and rotary")
    hook_v: HookPoint = point(_PER_KV_HEAD, "values")
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
    q_norm: Norm | None = norm("query norm", axes=_PER_HEAD, kind=lambda block: block.qk_norm, when=_QK_NORMED)
    k_norm: Norm | None = norm("key norm", axes=_PER_KV_HEAD, kind=lambda block: block.qk_norm, when=_QK_NORMED)
    hook_rot_q: HookPoint = point(_PER_HEAD, "queries after rotary", when=_ROTARY)
    hook_rot_k: HookPoint = point(_PER_KV_HEAD, "keys after rotary, as cached", when=_ROTARY)
    hook_attn_scores: HookPoint = point(
        "batch head query key", "scaled, soft-capped and biased scores before the softmax; masked entries are -inf"
    )
    hook_pattern: HookPoint = point("batch head query key", "attention pattern; rows sum to 1, fully masked rows are 0")
    hook_z: HookPoint = point(_PER_HEAD, "pattern-weighted values")
    hook_result: HookPoint = point(
        "batch pos head d_model",
        "what each head writes (z W_O); with b_O they sum to the attention output",
        on_request=True,
    )

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        cfg, positions = self.cfg, block.positions
        self.window = block.window
        self.score_scale = cfg.score_scale
        self.rotary = rotary_tables(positions, cfg.d_head) if isinstance(positions, RotaryPositions) else None
        self.alibi = positions if isinstance(positions, AlibiPositions) else None
        self.shares_keys = _SHARING.holds(block)

    def forward(
        self,
        q_input: HeadInput,
        k_input: HeadInput,
        v_input: HeadInput,
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
        maps, d_head = self._modules, self.cfg.d_head
        q = self.hook_q(project_heads(q_input, maps["q_proj"], d_head), call)
        k = self.hook_k(project_heads(k_input, maps["k_proj"], d_head), call)
        v = self.hook_v(project_heads(v_input, maps["v_proj"], d_head), call)
        table = None if self.rotary is None else self.rotary.look_up(plan, q_input.dtype)
        edited = None
        if self.shares_keys and (self.hook_k_per_head.listens(call) or self.hook_v_per_head.listens(call)):
            edited = self._watch_per_head(k, v, table, call, entry)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, call), self.k_norm(k, call)
        if self.rotary is not None and table is not None:
            q = self.hook_rot_q(self.rotary.rotate(q, table), call)
            k = self.hook_rot_k(self.rotary.rotate(k, table), call)
        if edited is not None:
            k, v = edited.take_over(k, v)
            # A frozen entry of no tokens adds nothing.
            entry = entry if entry is not None and len(entry) else None
        if entry is not None and (not entry.frozen or not len(entry)):
            k, v = entry.append(k, v)
            entry = None
        return self._write(self.hook_z(self._attend(q, k, v, plan, call, entry), call), call)

    def _watch_per_head(
        self, k: Tensor, v: Tensor, table: CosSin | None, call: Call, entry: HookedKeyValueCacheEntry | None
    ) -> "EditedHeads | None":
        """What listeners made of the keys and values that query heads read; None where they changed neither."""
        n_heads, keys, values = self.cfg.n_heads, None, None
        if self.hook_k_per_head.listens(call):
            copies, changed = self.hook_k_per_head.watch(repeat_heads(k, n_heads), call)
            if changed:
                keys = self._place_keys(copies, table)
        if self.hook_v_per_head.listens(call):
            copies, changed = self.hook_v_per_head.watch(repeat_heads(v, n_heads), call)
            if changed:
                values = copies
        if keys is None and values is None:
            return None
        if entry is not None and not entry.frozen:
            point = self.hook_v_per_head if keys is None else self.hook_k_per_head
            raise CacheError(
                f"{point.describe(copies)} was edited (or asked for gradients) in a call that appends to a key-value "
                f"cache; the cache keeps one key and value for each of {self.cfg.n_kv_heads} key-value heads, so later "
                "calls would read them without the edit. Run the whole sequence without a cache (past_kv_cache=None, "
                "in generate use_past_kv_cache=False) or on a frozen one, or edit the key-value head at hook_k or "
                "hook_v"
            )
        plain = None
        if keys is not None and self._hooks_behind_keys(call):
            plain = self._place_keys(k, table)
        return EditedHeads(keys, values, plain)

    def _hooks_behind_keys(self, call: Call) -> bool:
        """Whether somebody listens between `hook_k` and the scores."""
        in_norm = self.k_norm is not None and self.k_norm.listens(call)
        return in_norm or (self.rotary is not None and self.hook_rot_k.listens(call))

    def _place_keys(self, k: Tensor, table: CosSin | None) -> Tensor:
        """Keys after norm and rotation, whose hook points do not fire."""
        if self.k_norm is not None:
            k = self.k_norm.apply_weights(k)
        return k if self.rotary is None or table is None else self.rotary.rotate(k, table)

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
        if self.hook_attn_scores.listens(call) or self.hook_pattern.listens(call):
            all_k, all_v = (k, v) if frozen is None else _join_past(frozen, k, v)
            pattern, changed = self._watch_pattern(q, all_k, plan, call)
            if changed:
                return weigh_values(pattern, all_v)
        if frozen is not None:
            return self._attend_in_parts(q, k, v, plan, frozen)
        sight = plan.sight(self.window, q.dtype)
        if self.alibi is not None:
            q, k, v = fold_into_heads(q, k, v, self._alibi_entries(plan, plan.keys, q.dtype))
        z = attend(
            q,
            k,
            v,
            score_scale=self.score_scale,
            mask=sight.mask,
            is_causal=sight.is_causal,
            softcap=self.cfg.attn_softcap,
        )
        return z if self.alibi is None else z[..., : self.cfg.d_head]

    def _attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan, frozen: HookedKeyValueCacheEntry
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Attention over a frozen past and over the new tokens, put together; the past is not copied.

        A past of one row serves all rows of the batch.
        """
        past_k, past_v = frozen.past_keys, frozen.past_values
        visibility = plan.visibility(self.window)
        past = visibility.sight(plan.past, q.dtype, fold_rows=len(q) if len(past_k) == 1 and len(q) > 1 else None)
        new = visibility.sight(plan.new, q.dtype)
        if self.alibi is not None:
            past_k, past_v = fold_into_keys(
                past_k, past_v, self._alibi_entries(plan, plan.past, q.dtype, n_rows=len(past_k))
            )
            q, k, v = fold_into_heads(q, k, v, self._alibi_entries(plan, plan.new, q.dtype))
        parts = [KeyPart(past_k, past_v, past.mask), KeyPart(k, v, new.mask, new.is_causal)]
        z = attend_in_parts(q, parts, score_scale=self.score_scale, softcap=self.cfg.attn_softcap)
        return z if self.alibi is None else z[..., : self.cfg.d_head]

    def _watch_pattern(self, q: Tensor, k: Tensor, plan: TokenPlan, call: Call) -> tuple[Tensor, bool]:
        """The pattern as listeners leave it, and whether they changed the scores or it."""
        sight = plan.visibility(self.window).sight(plan.keys, q.dtype, explicit=True)
        scores = compute_scores(
            q,
            k,
            score_scale=self.score_scale,
            term=self._alibi_term(plan, q.dtype),
            softcap=self.cfg.attn_softcap,
            mask=sight.mask,
        )
        scores_changed = False
        if self.hook_attn_scores.listens(call):
            scores, scores_changed = self.hook_attn_scores.watch(scores, call)
        watched = self.hook_pattern.listens(call)
        if not (scores_changed or watched):
            return scores, False
        pattern, pattern_changed = compute_pattern(scores, can_hide_all=sight.can_hide_all or scores_changed), False
        if watched:
            pattern, pattern_changed = self.hook_pattern.watch(pattern, call)
        return pattern, scores_changed or pattern_changed

    def _slopes(self, plan: TokenPlan) -> Float[Tensor, " head"]:
        n_heads = self.cfg.n_heads
        return plan.remember(("alibi slopes", n_heads), lambda: alibi_slopes(n_heads, plan.device))

    def _alibi_term(self, plan: TokenPlan, dtype: torch.dtype) -> Float[Tensor, "rows key head"] | None:
        alibi = self.alibi
        if alibi is None:
            return None
        return plan.remember(
            ("alibi term", alibi, dtype),
            lambda: alibi_term(alibi, self._slopes(plan), plan.key_positions, self.score_scale, dtype),
        )

    def _alibi_entries(
        self, plan: TokenPlan, keys: range, dtype: torch.dtype, *, n_rows: int | None = None
    ) -> AlibiEntries:
        """What queries and keys get appended; made once per call for all layers."""
        alibi = self.alibi
        assert alibi is not None
        return plan.remember(
            ("alibi entries", alibi, keys, dtype),
            lambda: make_alibi_entries(
                alibi,
                self._slopes(plan),
                plan.key_positions[:n_rows, keys.start : keys.stop],
                n_positions=plan.n_positions,
                n_kv_heads=self.cfg.n_kv_heads,
                score_scale=self.score_scale,
                dtype=dtype,
            ),
        )

    def _write(self, z: Float[Tensor, "batch pos head d_head"], call: Call) -> Float[Tensor, "batch pos d_model"]:
        o_proj = self._modules["o_proj"]
        assert o_proj is not None
        if self.hook_result.listens(call):
            result, bias = self._results(z, o_proj)
            result, changed = self.hook_result.watch(result, call)
            if changed:
                summed = result.sum(2)
                return summed if bias is None else summed + bias
        return apply_linear(o_proj, z.flatten(2))

    def _results(
        self, z: Tensor, o_proj: nn.Module
    ) -> tuple[Float[Tensor, "batch pos head d_model"], Float[Tensor, "..."] | None]:
        """What each head writes, and the bias that is added to their sum."""
        if is_plain(o_proj):
            return torch.einsum("bpnh,nhm->bpnm", z, self.W_O), self.b_O
        # Whatever stands there is linear: what it makes of one head alone, less what it makes of nothing.
        alone = torch.diag_embed(z.transpose(2, 3)).permute(0, 1, 3, 4, 2)
        bias: Tensor = o_proj(torch.zeros_like(z[:1, :1]).flatten(2))
        return o_proj(alone.flatten(3)) - bias[:, :, None], bias


class EditedHeads(NamedTuple):
    """Keys and values that listeners changed for single query heads.

    Attributes:
        keys: after norm and rotation, `[batch pos head d_head]`; None: as they were.
        values: `[batch pos head d_head]`; None: as they were.
        plain: the unchanged keys after norm and rotation, `[batch pos kv_head d_head]`, where somebody listens there.
    """

    keys: Tensor | None
    values: Tensor | None
    plain: Tensor | None

    def take_over(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values to go on with, given the key-value heads'.

        What listeners in the norm or behind the rotation added to the keys is added to the changed ones, too, so that
        an edit or a gradient there still counts. Where they only look that is exactly 0.
        """
        if self.keys is not None:
            k = self.keys if self.plain is None else self.keys + repeat_heads(k - self.plain, self.keys.shape[2])
        return k, v if self.values is None else self.values


def _join_past(past: HookedKeyValueCacheEntry, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Past + new keys and values; of the new ones either may have a head for each query head."""
    if k.shape[2] == v.shape[2] == past.past_keys.shape[2]:
        return past.append(k, v)
    keys, values = (
        torch.cat([repeat_heads(old, new.shape[2]).expand(len(new), -1, -1, -1), new], 1)
        for old, new in ((past.past_keys, k), (past.past_values, v))
    )
    return keys, values


def project_heads(x: HeadInput, linear: nn.Module | None, d_head: int) -> Float[Tensor, "batch pos heads d_head"]:
    """`x W + b` for each head, on one input for all heads or a copy for each."""
    assert linear is not None
    if x.ndim == 3:
        flat = apply_linear(linear, x)
        return flat.view(flat.shape[0], flat.shape[1], -1, d_head)
    if is_plain(linear):
        own: dict[str, Tensor] = linear.__dict__["_parameters"]
        heads: Tensor = torch.einsum("bpnm,nhm->bpnh", x, own["weight"].view(-1, d_head, x.shape[-1]))
        bias = own["bias"]
        return heads if bias is None else heads + bias.view(-1, d_head)
    # Something stands around the map: all heads of every copy, of which each copy's own is taken.
    each = torch.unflatten(apply_linear(linear, x), -1, (-1, d_head))
    return each.diagonal(dim1=2, dim2=3).movedim(-1, 2)
