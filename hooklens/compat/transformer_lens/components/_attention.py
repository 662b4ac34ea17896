"""Attention of TransformerLens 2.x."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooklens.compat.transformer_lens.components._parts import CLASSES, Component, Config, bias_or_zeros, network_of
from hooklens.compat.transformer_lens.components._steps import AttentionSteps
from hooklens.compat.transformer_lens.FactoredMatrix import FactoredMatrix
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.utilities import create_alibi_bias, create_alibi_slope
from hooklens.hooks.call import Call
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention import attention
from hooklens.model.attention.alibi import alibi_slopes
from hooklens.model.attention.attend import repeat_heads
from hooklens.model.parts.alone import plan_alone
from hooklens.model.plan.positions import TokenPlan


def _derived(read: Callable[[Any], Tensor | None], doc: str) -> Any:
    """A buffer of 2.x that is made when it is read; it may be set to what it is."""

    def check(part: Any, given: Tensor | None) -> None:
        own = read(part)
        is_same = own is given or (own is not None and given is not None and own.shape == given.shape)
        if not is_same or (own is not None and given is not None and not torch.equal(own, given.to(own))):
            raise NotImplementedError(f"{doc} The layer's own cannot be changed: hook what it is used for")

    return property(read, check, doc=doc)


class AbstractAttention(Component, AttentionSteps, attention.Attention):
    """What both kinds of attention have."""

    is_ungrouped = property(lambda self: False, doc="Whether query heads have copies of keys and values they share.")

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        words, layer, is_local = HookedTransformerConfig.unwrap(cfg), layer_id or 0, attn_type == "local"
        if attn_type not in ("global", "local"):
            raise ValueError(f"Invalid attention type: {attn_type}")
        if is_local and not isinstance(words.window_size, int):
            raise ValueError("Window size must be an integer for local attention")
        if words.scale_attn_by_inverse_layer_idx and layer_id is None:
            raise ValueError("Layer ID must be provided to scale attention scores")
        n_shared = words.n_key_value_heads if self.shares_heads else None
        layers = {"n_layers": layer + 1, "use_local_attn": is_local, "attn_types": [attn_type] * (layer + 1)}
        own = network_of(cfg, n_key_value_heads=n_shared, **layers).block(layer)
        assert own.attn is not None
        attention.Attention.__init__(self, own.of(own.attn))
        self.start(cfg)

    def forward(  # type: ignore[override]
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor, *rest: Any, **words: Any
    ) -> Tensor:
        """What attention adds to the stream; a plan behind the inputs makes it a call of HookLens's."""
        is_planned = bool(rest) and isinstance(rest[0], TokenPlan)
        run = super().forward if is_planned else self._attend_as_2x
        return run(query_input, key_input, value_input, *rest, **words)

    def _attend_as_2x(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor,
        past_kv_cache_entry: HookedKeyValueCacheEntry | None = None, additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if additive_attention_mask is not None or position_bias is not None:
            raise NotImplementedError("additive_attention_mask, position_bias: encoders', which are not here")
        plan, call = plan_alone(query_input, self.cfg, past_kv_cache_entry, attention_mask)
        # Shortformer's positions are in the inputs.
        plan.embedded_positions = query_input.new_zeros(1, 1, 1)
        return super().forward(query_input, key_input, value_input, plan, call, past_kv_cache_entry)

    b_Q, b_K, b_V, b_O = map(bias_or_zeros, ("b_Q", "b_K", "b_V", "b_O"))
    OV = property(lambda self: FactoredMatrix(self.W_V, self.W_O), doc="`W_V W_O` of every head.")
    QK = property(lambda self: FactoredMatrix(self.W_Q, self.W_K.mT), doc="`W_Q W_K^T` of every head.")
    attn_type = property(lambda self: "local" if isinstance(self.reach, int) else "global", doc="How far it sees.")
    attn_scale = property(lambda self: 1 / self.score_scale, doc="What scores are divided by.")
    IGNORE = property(lambda self: torch.tensor(-torch.inf, device=self.W_O.device), doc="The score of no key.")

    rotary_cos = _derived(lambda self: self._wave(0), "`[n_ctx rotary_dim]`; None without rotary.")
    rotary_sin = _derived(lambda self: self._wave(1), "`[n_ctx rotary_dim]`; None without rotary.")
    mask = _derived(lambda self: self._mask(), "Which keys each query sees, of the longest sequence.")
    create_alibi_multipliers = staticmethod(alibi_slopes)
    create_alibi_slope, create_alibi_bias = staticmethod(create_alibi_slope), staticmethod(create_alibi_bias)

    def _wave(self, which: int) -> Tensor | None:
        rotary, like = self.rotary, self.W_O
        return None if rotary is None else rotary.waves(self.cfg.n_ctx, like.device, like.dtype)[which]

    def _mask(self) -> Tensor:
        seen = torch.ones(self.cfg.n_ctx, self.cfg.n_ctx, dtype=torch.bool, device=self.W_O.device).tril()
        return seen.triu(1 - self.reach) if isinstance(self.reach, int) else seen


class Attention(AbstractAttention):
    """Attention with keys and values for each head."""


def _per_head(name: str) -> Any:
    """A weight of keys or values with a row for each query head."""

    def read(attn: Any) -> Tensor:
        weight: Tensor = attn.read_weight(name)
        return weight.repeat_interleave(attn.cfg.n_heads // len(weight), dim=0)

    return property(read, doc=f"`{name}` of each query head; `_{name}` is what key-value heads have.")


class GroupedQueryAttention(AbstractAttention):
    """Attention whose query heads share keys and values."""

    shares_heads = True

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        assert HookedTransformerConfig.unwrap(cfg).n_key_value_heads is not None, "n_key_value_heads must be given"
        super().__init__(cfg, attn_type, layer_id)

    W_K, W_V, b_K, b_V = map(_per_head, ("W_K", "W_V", "b_K", "b_V"))

    is_ungrouped = property(lambda self: bool(self.cfg.ungroup_grouped_query_attention))

    def project(self, letter: str, x: Tensor, plan: TokenPlan, call: Call | None = None) -> Tensor:
        """Queries, keys or values; of keys and values a copy for each query head, where that is asked for."""
        if letter == "q" or not self.is_ungrouped:
            return super().project(letter, x, plan, call)
        if x.ndim == 3:
            return repeat_heads(super().project(letter, x, plan, call), self.cfg.n_heads)
        # Each copy of the stream goes through the maps of the head that its query head shares.
        copies = torch.unflatten(x, 2, (self.cfg.n_kv_heads, -1)).unbind(3)
        heads = [super(GroupedQueryAttention, self).project(letter, one, plan, call) for one in copies]
        return torch.stack(heads, 3).flatten(2, 3)

    def read_weight(self, name: str) -> Any:
        """A weight; those of keys and values of key-value heads."""
        if name in ("b_K", "b_V"):
            return bias_or_zeros(name).fget(self)
        is_shared = name in ("W_K", "W_V")
        return self.declared[name].__get__(self, type(self)) if is_shared else super().read_weight(name)


CLASSES[attention.Attention] = (Attention, GroupedQueryAttention)
