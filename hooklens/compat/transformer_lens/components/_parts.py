"""The parts of TransformerLens 2.x: HookLens's, with its names, arguments and calls on top.

`adopt` gives a model's parts these classes, and each can be made by itself of a config, with fresh weights then.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hooklens import hooks
from hooklens.compat.transformer_lens._hook_point import HookPoint
from hooklens.compat.transformer_lens.FactoredMatrix import FactoredMatrix
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.utilities import create_alibi_bias, create_alibi_slope
from hooklens.config import HookedConfig, NormConfig
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model import block, embed, mlp, norm
from hooklens.model.attention import attention
from hooklens.model.attention.alibi import alibi_slopes
from hooklens.model.initialization import initialize
from hooklens.model.parts.alone import load_weights, plan_alone
from hooklens.model.parts.part import Part
from hooklens.model.plan.positions import TokenPlan
from hooklens.weights.transformer_lens import write_state

Config = HookedTransformerConfig | dict[str, Any]
if TYPE_CHECKING:
    _Base = Part
else:
    # Beside HookLens's parts, so that what these declare stands.
    _Base = object
_SHARED = ("_W_K", "_W_V", "_b_K", "_b_V")
# What a state dict of 2.x holds beside weights that the part has.
_BESIDE = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U", "W_U", "mask", "IGNORE", "rotary_sin", "rotary_cos")


def network_of(cfg: Config, **changes: Any) -> HookedConfig:
    """HookLens's description of a config with some fields changed; an unknown vocabulary has one entry."""
    words = copy.copy(HookedTransformerConfig.unwrap(cfg))
    if words.d_vocab == -1:
        words.d_vocab = words.d_vocab_out = 1
    for name, value in changes.items():
        setattr(words, name, value)
    return words.to_hooked_config()


class PartWords(HookedConfig):
    """What a part's `cfg` is: HookLens's description, and beside its fields those of 2.x, which can be set."""

    words: HookedTransformerConfig

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "words" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.words, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        setattr(self.words, name, value)


def bias_or_zeros(name: str) -> Any:
    """A bias as 2.x has it: zeros where the map has none."""

    def read(part: Any) -> Tensor:
        declared = part.declared[name]
        held: Tensor | None = None if name in part.absent else declared.__get__(part, type(part))
        if held is not None:
            return held
        # A tied unembedding has no parameters of its own.
        like: Tensor = part.W_U if name == "b_U" else next(part.parameters())
        return like.new_zeros([part.size_of(axis) for axis in declared.axes.split()])

    return property(read, doc=f"`{name}`, zeros where the map has none.")


def _derived(read: Callable[[Any], Tensor | None], doc: str) -> Any:
    """A buffer of 2.x that is made when it is read; it may be set to what it is."""

    def check(part: Any, given: Tensor | None) -> None:
        own = read(part)
        is_same = own is given or (own is not None and given is not None and own.shape == given.shape)
        if not is_same or (own is not None and given is not None and not torch.equal(own, given.to(own))):
            raise NotImplementedError(f"{doc} The layer's own cannot be changed: hook what it is used for")

    return property(read, check, doc=doc)


class Component(_Base):
    """A part by its names of 2.x, in `load_state_dict` and, of a part by itself, in `state_dict`."""

    changes: ClassVar[dict[str, Any]] = {}

    def __init__(self, cfg: Config) -> None:
        super().__init__(network_of(cfg, **self.changes))
        self.start(cfg)

    def start(self, cfg: Config) -> None:
        """Draw fresh weights, and give what is inside its class."""
        with torch.no_grad():
            initialize(self, self.cfg.init_scheme, None)
        words = HookedTransformerConfig.unwrap(cfg)
        self.to(words.dtype)
        adopt(self, words)

    def __getattr__(self, name: str) -> Any:
        """`_W_K` and its like are what key-value heads have."""
        return self.read_weight(name[1:]) if name in _SHARED else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name[1:] if name in _SHARED else name, value)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """`state_of`; inside a model's state dict what HookLens has there."""
        if args or destination is not None:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        found = state_of(self)
        return {prefix + name: tensor if keep_vars else tensor.detach() for name, tensor in found.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights; a `RuntimeError` where names are missing or not known, and `strict`."""
        missing, unknown = load_weights(self, state_dict)
        if strict and (missing or unknown):
            raise RuntimeError(f"load_state_dict: missing are {missing}, unexpected {unknown}")
        return nn.modules.module._IncompatibleKeys(missing, unknown)


def state_of(root: nn.Module) -> dict[str, Tensor]:
    """Weights, biases that are 0, masks and rotary tables of all parts in a module, by their names of 2.x."""
    found: dict[str, Tensor] = {}
    for path, part in root.named_modules():
        if not isinstance(part, Part):
            continue
        is_ours = isinstance(part, Component)
        held = [name for name in _BESIDE if is_ours and isinstance(getattr(type(part), name, None), property)]
        own = {name: part.read_weight(name) for name in (*(one.name for one, _ in part.weight_table()), *held)}
        if isinstance(part, GroupedQueryAttention):
            own |= {name: own.pop(name[1:]) for name in _SHARED}
        found |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in own.items() if tensor is not None}
    return write_state(found)


class AnyNorm(Component, norm.Norm):
    """A norm over the width of the stream, or another."""

    kind, has_weight = "layer", True

    def __init__(self, cfg: Config, length: int | None = None) -> None:
        network = network_of(cfg)
        words: dict[str, Any] = {"kind": self.kind, "eps": float(HookedTransformerConfig.unwrap(cfg).eps)}
        own = NormConfig(**words, weight=self.has_weight, bias=self.has_weight and self.kind == "layer")
        size = network.d_model if length is None else length
        spec = norm.NormSpec(cfg=network, norm=own, axes=norm.STREAM, where="", size_in=lambda axis: size)
        norm.Norm.__init__(self, spec, place="")
        self.start(cfg)

    eps = property(lambda self: self.norm.eps)
    length = property(lambda self: self.size[0])


class LayerNorm(AnyNorm):
    """LayerNorm with weight and bias."""


class LayerNormPre(AnyNorm):
    """LayerNorm without weight and bias."""

    has_weight = False


class RMSNorm(AnyNorm):
    """RMSNorm with a weight."""

    kind = "rms"


class RMSNormPre(AnyNorm):
    """RMSNorm without a weight."""

    kind, has_weight = "rms", False


class AbstractAttention(Component, attention.Attention):
    """What both kinds of attention have."""

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        words, layer, is_local = HookedTransformerConfig.unwrap(cfg), layer_id or 0, attn_type == "local"
        if attn_type not in ("global", "local"):
            raise ValueError(f"Invalid attention type: {attn_type}")
        if is_local and not isinstance(words.window_size, int):
            raise ValueError("Window size must be an integer for local attention")
        if words.scale_attn_by_inverse_layer_idx and layer_id is None:
            raise ValueError("Layer ID must be provided to scale attention scores")
        n_shared = words.n_key_value_heads if isinstance(self, GroupedQueryAttention) else None
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

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        assert HookedTransformerConfig.unwrap(cfg).n_key_value_heads is not None, "n_key_value_heads must be given"
        super().__init__(cfg, attn_type, layer_id)

    W_K, W_V, b_K, b_V = map(_per_head, ("W_K", "W_V", "b_K", "b_V"))

    def read_weight(self, name: str) -> Any:
        """A weight; those of keys and values of key-value heads."""
        if name in ("b_K", "b_V"):
            return bias_or_zeros(name).fget(self)
        is_shared = name in ("W_K", "W_V")
        return self.declared[name].__get__(self, type(self)) if is_shared else super().read_weight(name)


class Embed(Component, embed.Embed):
    """Token embedding."""


class PosEmbed(Component, embed.PosEmbed):
    """Position embedding."""

    changes: ClassVar[dict[str, Any]] = {"positional_embedding_type": "standard"}

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor | None = None,
        past_kv_pos_offset: int = 0,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The vectors of the positions of tokens, 0 at padding; HookLens gives the positions themselves."""
        if positions is not None or tokens is None:
            return super().forward(positions=positions)  # type: ignore[arg-type]
        mask = tokens.new_ones(len(tokens), past_kv_pos_offset + tokens.shape[1])
        mask = mask if attention_mask is None else attention_mask
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, past_kv_pos_offset:]
        found = super().forward(positions=at)
        return found * mask[:, past_kv_pos_offset:, None].to(found)


class HeadPosEmbed(PosEmbed, embed.HeadPosEmbed):
    """Position embedding of shortformer's kind."""


class Unembed(Component, embed.Unembed):
    """Unembedding.

    Attributes:
        softcap: the soft cap on logits that the config of the model has now, 0 or less for none; None: the network's.
    """

    softcap: float | None = None
    b_U = bias_or_zeros("b_U")

    def cap(self, logits: Tensor) -> Tensor:
        """Logits under the soft cap."""
        if self.softcap is None:
            return super().cap(logits)
        return logits if self.softcap <= 0 else self.softcap * torch.tanh(logits / self.softcap)


class TiedUnembed(Unembed, embed.TiedUnembed):
    """Unembedding by the embedding's own weight."""


class TransformerBlock(Component, block.Block):
    """Attention and MLP around the residual stream."""

    def __init__(self, cfg: Config, block_index: int) -> None:
        block.Block.__init__(self, network_of(cfg).block(block_index))
        self.start(cfg)

    def forward(self, resid_pre: Tensor, *rest: Any, **words: Any) -> Tensor:  # type: ignore[override]
        """The stream leaving the block; a plan behind the stream makes it a call of HookLens's."""
        is_planned = bool(rest) and isinstance(rest[0], TokenPlan)
        return super().forward(resid_pre, *rest, **words) if is_planned else self._run_as_2x(resid_pre, *rest, **words)

    def _run_as_2x(
        self, resid_pre: Tensor, shortformer_pos_embed: Tensor | None = None,
        past_kv_cache_entry: HookedKeyValueCacheEntry | None = None, attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        plan, call = plan_alone(resid_pre, self.cfg, past_kv_cache_entry, attention_mask)
        if shortformer_pos_embed is not None and self.attn._pos_embed is None:
            # What is added stands in the plan: nothing is looked up.
            self.attn.read_positions_from(self.attn)
        plan.embedded_positions = (
            resid_pre.new_zeros(1, 1, 1) if shortformer_pos_embed is None else shortformer_pos_embed
        )
        return super().forward(resid_pre, plan, call, past_kv_cache_entry)


# The classes of HookLens's parts in 2.x, or what chooses one.
CLASSES: dict[type, Any] = {
    hooks.HookPoint: HookPoint, embed.Embed: Embed, embed.PosEmbed: PosEmbed, embed.HeadPosEmbed: HeadPosEmbed,
    embed.Unembed: Unembed, embed.TiedUnembed: TiedUnembed, block.Block: TransformerBlock,
}  # fmt: skip
_NORMS = {"layer": (LayerNorm, LayerNormPre), "rms": (RMSNorm, RMSNormPre)}


def adopt(root: Part, words: HookedTransformerConfig) -> None:
    """Give all parts and hook points inside a network or part the classes of 2.x, and parts its config, too."""
    cfg = PartWords.__new__(PartWords)
    cfg.__dict__.update(root.cfg.__dict__, words=words)
    for module in root.modules():
        part: Any = module
        if isinstance(part, Part) and (part is not root or isinstance(root, Component)):
            part.cfg = cfg
        if type(part) is norm.Norm:
            part.__class__ = _NORMS[part.norm.kind][part.w is None]
            # 2.x shows what a LayerNorm gives, and of other norms what they divide.
            part.shows_output = type(part) is LayerNorm
        elif type(part) is attention.Attention:
            part.__class__ = Attention if part.cfg.n_kv_heads == part.cfg.n_heads else GroupedQueryAttention
        elif type(part) is mlp.MLP:
            part.__class__ = CLASSES[mlp.MLP][part.gated]
        else:
            part.__class__ = CLASSES.get(type(part), type(part))
        if isinstance(part, TransformerBlock) and not part.changes_branches:
            # Code asks for them by `hasattr`.
            for name in ("ln1_post", "ln2_post"):
                part.__dict__.pop(name, None)
