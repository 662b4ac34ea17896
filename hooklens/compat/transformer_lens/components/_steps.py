"""The steps of attention that TransformerLens 2.x has as methods, for code that calls them by themselves.

HookLens's forward does not go through them: what nobody asks for is not made there. They are not to be overridden.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.compat.transformer_lens._tokenizing import get_offset_position_ids
from hooklens.config import RotaryPositions
from hooklens.hooks import open_call
from hooklens.model.attention.attend import compute_scores, weigh_values
from hooklens.model.attention.rotary import rotary_tables
from hooklens.model.parts.alone import plan_alone

Queries = Float[Tensor, "batch query head d_head"]
# As many as share one where query heads do.
Keys = Float[Tensor, "batch key kv_head d_head"]
Heads = Float[Tensor, "batch pos heads d_head"]


class AttentionSteps:
    """What each step makes of its input."""

    def calculate_qkv_matrices(
        self: Any, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> tuple[Queries, Keys, Keys]:
        """Queries, keys and values, as their hook points show them; with norms of queries and keys, behind these."""
        plan, call = plan_alone(query_input, self.cfg)
        plan.embedded_positions = query_input.new_zeros(1, 1, 1)
        inputs = {"q": query_input, "k": key_input, "v": value_input}
        q, k, v = (getattr(self, f"hook_{one}")(self.project(one, x, plan, call), call) for one, x in inputs.items())
        if self.q_norm is None or self.k_norm is None or self.norms_last:
            return q, k, v
        return self.q_norm(q, call), self.k_norm(k, call), v

    def calculate_attention_scores(self: Any, q: Queries, k: Keys) -> Float[Tensor, "batch head query key"]:
        """Scaled and capped products of queries and keys."""
        return compute_scores(q, k, score_scale=self.score_scale, term=None, softcap=self.cfg.attn_softcap, mask=None)

    def calculate_z_scores(self: Any, v: Keys, pattern: Float[Tensor, "batch head query key"]) -> Queries:
        """Values weighed by a pattern, as `hook_z` shows them."""
        z: Tensor = self.hook_z(weigh_values(pattern, v), open_call())
        return z

    def apply_causal_mask(
        self: Any,
        attn_scores: Float[Tensor, "batch head query key"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch head query key"]:
        """Scores with `IGNORE` where a query does not see a key."""
        n_query, n_key = attn_scores.shape[-2:]
        if n_query + past_kv_pos_offset != n_key:
            raise ValueError(
                f"query_ctx_length {n_query} + past_kv_pos_offset {past_kv_pos_offset} != key_ctx_length {n_key}"
            )
        seen = self.mask[n_key - n_query : n_key, :n_key]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, :]
        return attn_scores.masked_fill(~seen.to(attn_scores.device), -torch.inf)

    def calculate_sin_cos_rotary(
        self: Any, rotary_dim: int, n_ctx: int, base: int = 10000, dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "n_ctx rotary_dim"], Float[Tensor, "n_ctx rotary_dim"]]:
        """The sine and the cosine of each entry's angle at each position."""
        own = self.rotary
        positions = RotaryPositions(
            dim=rotary_dim,
            base=base,
            layout="interleaved" if self.cfg.rotary_adjacent_pairs else "half",
            scaling=None if own is None else own.positions.scaling,
        )
        cos, sin = rotary_tables(positions, rotary_dim).waves(n_ctx, torch.device("cpu"), dtype)
        return sin, cos

    def rotate_every_two(self: Any, x: Float[Tensor, "... rotary_dim"]) -> Float[Tensor, "... rotary_dim"]:
        """Each of the pairs that turn together, `[a, b]`, as `[-b, a]`."""
        if self.cfg.rotary_adjacent_pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    def apply_rotary(
        self: Any, x: Heads, past_kv_pos_offset: int = 0, attention_mask: Int[Tensor, "batch key"] | None = None
    ) -> Heads:
        """Queries or keys turned by the angles of their positions."""
        turning, still = x[..., : self.cfg.rotary_dim], x[..., self.cfg.rotary_dim :]
        at: Any = slice(past_kv_pos_offset, past_kv_pos_offset + x.shape[1])
        if attention_mask is not None:
            at = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        cos, sin = (table[at][..., None, :].to(x.device) for table in (self.rotary_cos, self.rotary_sin))
        return torch.cat([turning * cos + self.rotate_every_two(turning) * sin, still], -1)
