"""Attention: projections, positions, the pattern where somebody watches it, and the write to the stream."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import AlibiPositions, HookedConfig, RotaryPositions
from hooklens.errors import CacheError
from hooklens.hooks import HookPoint
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.alibi import alibi_slopes, alibi_term, fold_into_heads
from hooklens.model.attend import (
    attend,
    attend_with_log_sum,
    compute_pattern,
    compute_scores,
    merge_parts,
    repeat_heads,
    weigh_values,
)
from hooklens.model.norm import Norm
from hooklens.model.positions import TokenPlan
from hooklens.model.rotary import CosSin, RotaryTables
from hooklens.model.stored import StoredWeights
from hooklens.weights.layout import empty_weight

# The normed stream, the same for all heads or (edited per head) a copy for each.
HeadInput = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos _ d_model"]


class Attention(StoredWeights):
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

    _view_names = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")

    def __init__(self, cfg: HookedConfig, layer: int, rotary: RotaryTables | None) -> None:
        super().__init__()
        self.cfg = cfg
        self.window = cfg.window(layer)
        self.rotary = rotary
        self.alibi = cfg.positions if isinstance(cfg.positions, AlibiPositions) else None
        self.slopes = alibi_slopes(cfg.n_heads) if self.alibi is not None else None
        self._make_weights(cfg)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.shares_keys = cfg.n_kv_heads != cfg.n_heads
        if self.shares_keys:
            self.hook_k_per_head = HookPoint()
            self.hook_v_per_head = HookPoint()
        if cfg.qk_norm is not None:
            self.q_norm = Norm(cfg.qk_norm, cfg.d_head)
            self.k_norm = Norm(cfg.qk_norm, cfg.d_head)
        if isinstance(cfg.positions, RotaryPositions):
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    def _make_weights(self, cfg: HookedConfig) -> None:
        def weight(name: str, *shape: int) -> nn.Parameter:
            return nn.Parameter(empty_weight(name, shape))

        d_model, d_head = cfg.d_model, cfg.d_head
        self.W_Q = weight("W_Q", cfg.n_heads, d_model, d_head)
        self.W_K = weight("W_K", cfg.n_kv_heads, d_model, d_head)
        self.W_V = weight("W_V", cfg.n_kv_heads, d_model, d_head)
        self.W_O = weight("W_O", cfg.n_heads, d_head, d_model)
        self.b_Q = weight("b_Q", cfg.n_heads, d_head) if cfg.qkv_bias else None
        self.b_K = weight("b_K", cfg.n_kv_heads, d_head) if cfg.qkv_bias else None
        self.b_V = weight("b_V", cfg.n_kv_heads, d_head) if cfg.qkv_bias else None
        self.b_O = weight("b_O", d_model) if cfg.out_bias else None

    def forward(
        self,
        q_input: HeadInput,
        k_input: HeadInput,
        v_input: HeadInput,
        plan: TokenPlan,
        rotary_table: CosSin | None,
        entry: HookedKeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream.

        Args:
            q_input: the normed stream that queries read, the same for all heads or a copy for each.
            k_input: the same for keys.
            v_input: the same for values.
            plan: the tokens of this call.
            rotary_table: cosines and sines of this call's positions.
            entry: this layer's past keys and values, which the new ones are appended to.

        Raises:
            CacheError: keys or values of single query heads were edited, and the entry would store them.
        """
        W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O = self.stored_weights()
        d_head = self.cfg.d_head
        q = self.hook_q(project_heads(q_input, W_Q, b_Q, d_head))
        k = self.hook_k(project_heads(k_input, W_K, b_K, d_head))
        v = self.hook_v(project_heads(v_input, W_V, b_V, d_head))
        edited = None
        if self.shares_keys and (self.hook_k_per_head.listening or self.hook_v_per_head.listening):
            edited = self._watch_per_head(k, v, rotary_table, entry)
        if self.cfg.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and rotary_table is not None:
            q = self.hook_rot_q(self.rotary.rotate(q, rotary_table))
            k = self.hook_rot_k(self.rotary.rotate(k, rotary_table))
        if edited is not None:
            k, v = edited.take_over(k, v)
            # A frozen entry of no tokens adds nothing.
            entry = entry if entry is not None and len(entry) else None
        if entry is not None and (not entry.frozen or not len(entry)):
            k, v = entry.append(k, v)
            entry = None
        return self._write(self.hook_z(self._attend(q, k, v, plan, entry)), W_O, b_O)

    def _watch_per_head(
        self, k: Tensor, v: Tensor, rotary_table: CosSin | None, entry: HookedKeyValueCacheEntry | None
    ) -> "EditedHeads | None":
        """What listeners made of the keys and values that query heads read; None where they changed neither."""
        n_heads, keys, values = self.cfg.n_heads, None, None
        if self.hook_k_per_head.listening:
            copies, changed = self.hook_k_per_head.watch(repeat_heads(k, n_heads))
            if changed:
                keys = self._place_keys(copies, rotary_table)
        if self.hook_v_per_head.listening:
            copies, changed = self.hook_v_per_head.watch(repeat_heads(v, n_heads))
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
        if keys is not None and self._hooks_behind_keys():
            plain = self._place_keys(k, rotary_table)
        return EditedHeads(keys, values, plain)

    def _hooks_behind_keys(self) -> bool:
        """Whether somebody listens between `hook_k` and the scores."""
        in_norm = self.cfg.qk_norm is not None and self.k_norm.listening
        return in_norm or (self.rotary is not None and self.hook_rot_k.listening)

    def _place_keys(self, k: Tensor, rotary_table: CosSin | None) -> Tensor:
        """Keys after norm and rotation, whose hook points do not fire."""
        if self.cfg.qk_norm is not None:
            k = self.k_norm.apply_weights(k)
        return k if self.rotary is None or rotary_table is None else self.rotary.rotate(k, rotary_table)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan, frozen: HookedKeyValueCacheEntry | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Pattern-weighted values; with a frozen entry `k` and `v` are the new tokens' only."""
        watched = self.hook_attn_scores.listening or self.hook_pattern.listening
        softcapped = self.cfg.attn_softcap is not None and frozen is None
        if watched or softcapped:
            all_k, all_v = (k, v) if frozen is None else _join_past(frozen, k, v)
            pattern, changed = self._watch_pattern(q, all_k, plan)
            if changed or softcapped:
                return weigh_values(pattern, all_v)
        if frozen is not None:
            return self._attend_in_parts(q, k, v, plan, frozen)
        return self._attend_fused(q, k, v, plan)

    def _attend_fused(self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan) -> Tensor:
        scale, d_head = self.cfg.score_scale, q.shape[-1]
        is_causal = plan.is_causal_only(self.window)
        mask = None if is_causal else plan.additive_mask(self.window, q.dtype)
        term = self._alibi_term(plan, q.dtype)
        if term is None:
            return attend(q, k, v, score_scale=scale, mask=mask, is_causal=is_causal)
        q, k, v = fold_into_heads(q, k, v, term, scale)
        return attend(q, k, v, score_scale=scale, mask=mask, is_causal=is_causal)[..., :d_head]

    def _attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan, frozen: HookedKeyValueCacheEntry
    ) -> Tensor:
        """Attention over a frozen past and over the new tokens, put together; the past is not copied.

        A past of one row serves all rows of the batch: their queries stand one after another as the queries
        of one row.
        """
        d_head, n_past = q.shape[-1], len(frozen)
        past_k, past_v = frozen.past_keys, frozen.past_values
        fold_rows = frozen.batch_size == 1 and len(q) > 1
        new_plan = plan.new_part()
        is_causal = new_plan.is_causal_only(self.window)
        options: dict[str, Any] = {"score_scale": self.cfg.score_scale, "softcap": self.cfg.attn_softcap}

        past_q, new_q = q, q
        past_term = self._alibi_term(plan, q.dtype, rows=slice(len(past_k)), keys=slice(n_past))
        new_term = self._alibi_term(plan, q.dtype, keys=slice(n_past, None))
        if past_term is not None and new_term is not None:
            past_q, past_k, past_v = fold_into_heads(q, past_k, past_v, past_term, self.cfg.score_scale)
            new_q, k, v = fold_into_heads(q, k, v, new_term, self.cfg.score_scale)
        new_part = attend_with_log_sum(
            new_q,
            k,
            v,
            mask=None if is_causal else new_plan.additive_mask(self.window, q.dtype),
            is_causal=is_causal,
            **options,
        )
        past_mask = plan.past_mask(self.window, q.dtype, fold_rows=fold_rows)
        folded_q = past_q.flatten(0, 1)[None] if fold_rows else past_q
        past_z, past_log_sum = attend_with_log_sum(folded_q, past_k, past_v, mask=past_mask, is_causal=False, **options)
        if fold_rows:
            past_z = past_z.view(past_q.shape)
            past_log_sum = past_log_sum.view(-1, len(q), q.shape[1]).transpose(0, 1)
        return merge_parts((past_z, past_log_sum), new_part)[..., :d_head]

    def _watch_pattern(self, q: Tensor, k: Tensor, plan: TokenPlan) -> tuple[Tensor, bool]:
        """The pattern as listeners leave it, and whether they changed the scores or it."""
        scores = compute_scores(
            q,
            k,
            score_scale=self.cfg.score_scale,
            term=self._alibi_term(plan, q.dtype),
            softcap=self.cfg.attn_softcap,
            mask=plan.additive_mask(self.window, q.dtype),
        )
        scores, scores_changed = self.hook_attn_scores.watch(scores)
        if not (scores_changed or self.hook_pattern.listening or self.cfg.attn_softcap is not None):
            return scores, False
        pattern = compute_pattern(scores, can_hide_all=plan.can_hide_all or scores_changed)
        pattern, pattern_changed = self.hook_pattern.watch(pattern)
        return pattern, scores_changed or pattern_changed

    def _alibi_term(
        self, plan: TokenPlan, dtype: torch.dtype, *, rows: slice = slice(None), keys: slice = slice(None)
    ) -> Tensor | None:
        if self.alibi is None or self.slopes is None:
            return None
        return alibi_term(self.alibi, self.slopes, plan.key_positions[rows, keys], self.cfg.score_scale, dtype)

    def _write(
        self,
        z: Float[Tensor, "batch pos head d_head"],
        W_O: Float[Tensor, "d_model heads_and_d_head"],
        b_O: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.hook_result.listening:
            result = torch.einsum("bpnh,nhm->bpnm", z, self.W_O)
            result, changed = self.hook_result.watch(result)
            if changed:
                summed = result.sum(2)
                return summed if b_O is None else summed + b_O
        return F.linear(z.flatten(2), W_O, b_O)


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


def project_heads(
    x: HeadInput,
    weight: Float[Tensor, "heads_and_d_head d_model"],
    bias: Float[Tensor, " heads_and_d_head"] | None,
    d_head: int,
) -> Float[Tensor, "batch pos heads d_head"]:
    """`x W + b` for each head, on one input for all heads or a copy for each; weight and bias as they are stored."""
    if x.ndim == 3:
        flat = F.linear(x, weight, bias)
        return flat.view(flat.shape[0], flat.shape[1], -1, d_head)
    heads: Tensor = torch.einsum("bpnm,nhm->bpnh", x, weight.view(-1, d_head, x.shape[-1]))
    return heads if bias is None else heads + bias.view(-1, d_head)
