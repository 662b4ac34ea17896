"""The parts of TransformerLens 2.x: HookLens's, with its names, arguments and calls on top.

`adopt` gives a model's parts these classes, and each can be made by itself of a config, with fresh weights then.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hooklens import hooks
from hooklens.compat.transformer_lens.hook_points import HookPoint
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.utils import get_offset_position_ids
from hooklens.config import HookedConfig, NormConfig
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model import block, embed, mlp, norm
from hooklens.model.attention import attention
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


class Component(_Base):
    """A part by its names of 2.x, in `load_state_dict` and, of a part by itself, in `state_dict`."""

    changes: ClassVar[dict[str, Any]] = {}
    shares_heads: ClassVar[bool] = False

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
        if is_ours and part.shares_heads:
            own |= {name: own.pop(name[1:]) for name in _SHARED}
        found |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in own.items() if tensor is not None}
    return write_state(found)


def parameter_names(root: nn.Module) -> dict[int, str]:
    """By the `id` of each parameter that holds one weight of 2.x, however it lies, the name that this has there."""
    found: dict[int, str] = {}
    for path, module in root.named_modules():
        part: Any = module
        for name in (one.name for one, _ in part.weight_table()) if isinstance(part, Part) else ():
            weight: Tensor = part.read_weight(name)
            held = weight if weight._base is None else weight._base
            own = f"_{name}" if f"_{name}" in _SHARED and isinstance(part, Component) and part.shares_heads else name
            if held.numel() == weight.numel():
                found.setdefault(id(held), f"{path}.{own}".lstrip("."))
    return found


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


class Embed(Component, embed.Embed):
    """Token embedding."""


class PosEmbed(Component, embed.PosEmbed):
    """Position embedding."""

    changes: ClassVar[dict[str, Any]] = {"positional_embedding_type": "standard"}

    def forward(
        self, tokens: Tensor | None = None, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None, *,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The vectors of the positions of tokens, 0 at padding; HookLens gives the positions themselves."""
        if positions is not None or tokens is None:
            return super().forward(positions=positions)  # type: ignore[arg-type]
        mask = tokens.new_ones(len(tokens), past_kv_pos_offset + tokens.shape[1])
        mask = mask if attention_mask is None else attention_mask
        found = super().forward(positions=get_offset_position_ids(past_kv_pos_offset, mask))
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

    def _count_copies(self) -> tuple[int, int, int]:
        return (n := self.cfg.n_heads, n, n) if getattr(self.attn, "is_ungrouped", False) else super()._count_copies()

    def forward(self, resid_pre: Tensor, *rest: Any, **words: Any) -> Tensor:  # type: ignore[override]
        """The stream leaving the block; a plan behind the stream makes it a call of HookLens's."""
        is_planned = bool(rest) and isinstance(rest[0], TokenPlan)
        return super().forward(resid_pre, *rest, **words) if is_planned else self._run_as_2x(resid_pre, *rest, **words)

    def apply_mlp(self, normalized_resid: Tensor) -> Tensor:
        """What the MLP adds to the stream, as `hook_mlp_out` shows it."""
        _, call = plan_alone(normalized_resid, self.cfg)
        out, norm = self.mlp(normalized_resid, call), getattr(self, "ln2_post", None)
        found: Tensor = self.hook_mlp_out(out if norm is None else norm(out, call), call)
        return found

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
            part.__class__ = CLASSES[attention.Attention][part.cfg.n_kv_heads != part.cfg.n_heads]
        elif type(part) is mlp.MLP:
            part.__class__ = CLASSES[mlp.MLP][part.gated]
        else:
            part.__class__ = CLASSES.get(type(part), type(part))
        if isinstance(part, TransformerBlock) and not part.changes_branches:
            # Code asks for them by `hasattr`.
            for name in ("ln1_post", "ln2_post"):
                part.__dict__.pop(name, None)
