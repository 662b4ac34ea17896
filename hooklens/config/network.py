"""The description of a network: `HookedConfig`.

All parts are frozen, keyword-only and checked when made. `None` means that the part is absent. Nothing
here knows where a checkpoint came from; adapters translate to and from these fields.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hooklens.arguments import explains_keywords
from hooklens.config.activations import Activation
from hooklens.config.attention import AttentionBackend, NormOver, QueryTemperature
from hooklens.config.block import BlockConfig, PartConfig, read_part
from hooklens.config.checks import (
    read_fields,
)
from hooklens.config.combinations import BY_LAYER
from hooklens.config.description import Description, describe
from hooklens.config.foreign import translate
from hooklens.config.latent import find_latent
from hooklens.config.moe import mlp_width
from hooklens.config.norms import NormConfig
from hooklens.config.positions import (
    LearnedPositions,
    Positions,
    ShortformerPositions,
    positions_from_dict,
    positions_to_dict,
)
from hooklens.config.printed import print_config, summarise
from hooklens.config.settling import ATTENTION, LEFT_OUT, PARTS, InitScheme, Wiring, by_layer, settle
from hooklens.display import Displayed, Summary
from hooklens.errors import ConfigError

# Typed as the value that `settle` puts in its place, or misses.
_DERIVED: Any = None
_LAYER_NORM = NormConfig(kind="layer", eps=1e-5)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a configuration came from: enough to write the same checkpoint format back.

    Attributes:
        family: name of the adapter that read it.
        hub_config: the checkpoint's own `config.json`, as JSON text.
    """

    family: str
    hub_config: str


@explains_keywords
@dataclass(frozen=True, kw_only=True, repr=False)
class HookedConfig(Displayed):
    """All that decides the network's computation and the shapes of its weights.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key-value heads; divides `n_heads`. None: `n_heads`.
        d_head: width of a head; need not be `d_model / n_heads`. None: `d_model // n_heads`. In latent attention that
            of queries and keys; values have a width of their own.
        d_mlp: neurons of an MLP. None: `4 * d_model`.
        d_vocab: vocabulary entries.
        d_vocab_out: outputs of the unembedding, the classes of a classifier say. None: `d_vocab`.
        d_embed: width of the token embedding, where it is projected to `d_model` (`embed.W_proj_in`), and the stream
            back before the unembedding (`unembed.W_proj_out`). None: `d_model`, and no projections.
        n_ctx: longest sequence the model accepts.
        act_fn: activation of the MLP; see `hooklens.model.activations` for their definitions. `gelu_tanh` is the tanh
            approximation, also called `gelu_new` and `gelu_fast`.
        act_norm: the norm over the neurons of `act_fn="solu_ln"`. None: `norm`, where that is one LayerNorm for all
            layers, else a LayerNorm with eps 1e-5.
        swiglu_limit, swiglu_alpha: of `act_fn="clamped_swiglu"`. None: 7 and 1.702.
        gated_mlp: `act(x W_gate) * (x W_in)` in place of `act(x W_in)`.
        wiring: `"sequential"` (attention, then MLP on the sum) or `"parallel"` (both read `resid_pre`).
        shared_norm: parallel wiring only: `ln1` feeds attention and MLP, there is no `ln2`.
        norm: the kind of the norms around the branches. None: no norms there.
        norm_before: a norm at the entrance of each branch (`ln1`, `ln2`).
        norm_after: a norm at the exit of each branch (`ln1_post`, `ln2_post`).
        norm_stream: norms of the stream itself, behind each branch's sum (`ln1_stream`, `ln2_stream`; Vaswani et al.
            2017): the stream is then no sum of what was written to it.
        final_norm: the kind of `ln_final`; None: the unembedding reads the stream as it is. Left out: `norm`, where
            that is the same in all layers.
        qk_norm: norm of queries and keys. None: none.
        qk_norm_over: `"head"`: each head's query and key by itself; `"all_heads"`: those of all heads together, with a
            weight for each entry.
        qk_norm_per_head: a norm of each head by itself has a weight for each head, in place of one for all.
        qk_norm_after_rotary: queries and keys are normed after the rotation, in place of before it.
        positions: how positions enter. There is no default: none at all is asked for with `NoPositions()`.
        qkv_bias, out_bias, mlp_bias, unembed_bias: which linear maps have biases.
        q_bias, k_bias, v_bias: of one map, where it is not as `qkv_bias` says, which is written for most of them.
            None: it is.
        mlp_in_bias, mlp_gate_bias, mlp_out_bias: the same for `mlp_bias`.
        attn_scale: factor on the scores. None: `d_head ** -0.5` (see `score_scale`).
        attn_softcap: `cap * tanh(scores / cap)` on the scaled scores.
        attn_sinks: each query head has a learned logit, `attn.sinks`, that takes part in the softmax and has no value:
            rows of the pattern sum to less than 1.
        clip_qkv: queries, keys and values are held between `-clip_qkv` and it; queries and keys right before rotary,
            behind a norm that stands there, too.
        query_temperature: a factor on queries that grows with their position; after rotary and norm. None: none.
        logits_softcap: the same on the logits.
        attn: the part that attends in each block, an `MLAConfig` for multi-head latent attention. None: none.
        mlp: the part at the MLP's place, a `MoEConfig` for a mixture of experts. None: none.
        attn_only: no block has an MLP; short for `mlp=None`.
        windows: per layer, how many of the latest keys a query may see, its own included; None in a layer: all.
            Without causality, of those on either side: keys less than so many positions away.
        chunks: per layer, the size of chunks of positions, of which a query sees its own only; None in a layer: none.
        causal: no query sees a later key. False: every query sees every token of its row.
        document_mask: where a call says which documents its rows hold, a token sees its own document only. False: it
            sees its row, and positions start anew in each document only where a call asks for that.
        embed_scale: factor on the token embedding.
        embed_scale_rounded: the factor is rounded to the dtype of the weights before it is multiplied. In float32 that
            is no difference, in bfloat16 one of up to 1 in 256.
        embed_norm: the norm of the token embedding (`embed.ln`), after the factor and before positions. None: none.
        residual_scale: factor on what each branch adds to the stream; in `hook_attn_out` and `hook_mlp_out`.
        logits_scale: factor on the logits, before a soft cap; in `unembed.hook_out`.
        embed_dropout, attn_dropout, resid_dropout: shares of entries dropped in training mode (Srivastava et al.
            2014) of the embeddings, of the pattern, and of what each branch adds to the stream. Hook points show what
            is left. No part of equality, and in no checkpoint's config.
        tied_unembed: `W_U` is `W_E` transposed, one tensor.
        init_std: standard deviation of fresh weights, where their scheme asks for one (`"gpt2"`).
        init_scheme: how fresh weights are drawn, see `hooklens.model.initialization`; no part of equality.
        attention_backend: what computes attention, to the same numbers; no part of equality. `"sdpa"`: PyTorch's
            `scaled_dot_product_attention` and nothing else; `"explicit"`: scores, pattern and values one by one;
            `"flex"`: PyTorch's `flex_attention`; `"auto"`: for each call what is fastest and needs least memory.
        origin: where the configuration was read from; no part of equality.

    `attn`, `mlp`, `norm`, `norm_before`, `norm_after`, `qk_norm`, `positions`, `attn_scale` and `query_temperature`
    may differ by layer: then they are tuples with an entry for each. `block(layer)` is the description of one layer. A
    branch that a layer lacks has no norms there, and other settings of it have no effect.

    Raises:
        ConfigError: values of a wrong kind, or a combination that is no network, with all reasons.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    n_kv_heads: int = _DERIVED
    d_head: int = _DERIVED
    d_mlp: int = _DERIVED
    d_vocab_out: int = _DERIVED
    d_embed: int | None = None
    act_fn: Activation = "gelu"
    act_norm: NormConfig | None = None
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    gated_mlp: bool = False
    wiring: Wiring = "sequential"
    shared_norm: bool = False
    norm: NormConfig | tuple[NormConfig | None, ...] | None = _LAYER_NORM
    norm_before: bool | tuple[bool, ...] = True
    norm_after: bool | tuple[bool, ...] = False
    norm_stream: bool = False
    final_norm: NormConfig | None = LEFT_OUT
    qk_norm: NormConfig | tuple[NormConfig | None, ...] | None = None
    qk_norm_over: NormOver = "head"
    qk_norm_per_head: bool = False
    qk_norm_after_rotary: bool = False
    positions: Positions | tuple[Positions, ...] = _DERIVED
    attn: PartConfig | tuple[PartConfig | None, ...] | None = ATTENTION
    mlp: PartConfig | tuple[PartConfig | None, ...] | None = LEFT_OUT
    attn_only: bool = _DERIVED
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    q_bias: bool | None = None
    k_bias: bool | None = None
    v_bias: bool | None = None
    mlp_in_bias: bool | None = None
    mlp_gate_bias: bool | None = None
    mlp_out_bias: bool | None = None
    attn_scale: float | tuple[float | None, ...] | None = None
    attn_softcap: float | None = None
    attn_sinks: bool = False
    clip_qkv: float | None = None
    query_temperature: QueryTemperature | tuple[QueryTemperature | None, ...] | None = None
    logits_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    chunks: tuple[int | None, ...] | None = None
    causal: bool = True
    document_mask: bool = True
    embed_scale: float | None = None
    embed_scale_rounded: bool = False
    embed_norm: NormConfig | None = None
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    embed_dropout: float = field(default=0.0, compare=False)
    attn_dropout: float = field(default=0.0, compare=False)
    resid_dropout: float = field(default=0.0, compare=False)
    tied_unembed: bool = False
    init_std: float = 0.02
    init_scheme: InitScheme = field(default="gpt2", compare=False)
    attention_backend: AttentionBackend = field(default="auto", compare=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        settle(self)

    def __repr__(self) -> str:
        """The call that makes an equal configuration, without what is left out: at most twenty lines."""
        return print_config(self)

    def _summary(self) -> Summary:
        return summarise(self)

    def block(self, layer: int) -> BlockConfig:
        """The description of one layer, counted from 0."""
        return BlockConfig(self, layer)

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The descriptions of all layers."""
        return tuple(map(self.block, range(self.n_layers)))

    @cached_property
    def description(self) -> Description:
        """The weights and hook points of the network, as its parts declare them."""
        return describe(self)

    def size(self, axis: str) -> int:
        """The size of an axis that the configuration fixes: `head`, `kv_head`, `d_head`, `d_model`, ...

        Raises:
            ConfigError: the axis (`batch`, `pos`, `query`, `key`) is fixed by the input, not by the model.
        """
        sizes = {
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "d_vocab": self.d_vocab,
            "d_vocab_out": self.d_vocab_out,
            "one": 1,
        }
        if self.d_embed is not None:
            sizes["d_embed"] = self.d_embed
        if isinstance(self.positions, LearnedPositions | ShortformerPositions):
            sizes["position"] = self.n_ctx + self.positions.offset
        size = sizes.get(axis)
        if size is None:
            raise ConfigError(f"axis {axis!r} has no size of its own; the config fixes {', '.join(sizes)}")
        return size

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores: `attn_scale`, or `d_head ** -0.5` where that is None.

        Raises:
            ConfigError: it differs by layer; `block(layer).score_scale` is that of one.
        """
        if isinstance(self.attn_scale, tuple):
            raise ConfigError("attn_scale differs by layer: cfg.block(layer).score_scale is the factor of one layer")
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    def window(self, layer: int) -> int | None:
        """How many of the latest keys a query of this layer may see; None: all."""
        return self.block(layer).window

    @cached_property
    def mlp_width(self) -> int:
        """How many numbers the widest part at the MLP's place makes of a token at once."""
        return mlp_width(self)

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """Key-value heads of each layer, 0 where it has no attention."""
        return tuple(0 if block.attn is None else self.n_kv_heads for block in self.blocks)

    @cached_property
    def head_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Key-value heads of each layer, and the widths of keys and values."""
        return tuple((n, self.d_head, block.d_head_v) for n, block in zip(self.kv_heads, self.blocks, strict=True))

    @property
    def d_head_v(self) -> int:
        """The width of a head's values: `d_head`, but in latent attention; of the first layer that has such."""
        latent = find_latent(self.attn)
        return self.d_head if latent is None else latent.d_head_v

    @property
    def cache_width(self) -> int:
        """How many numbers a key-value cache holds of a token, in all layers together."""
        return sum(n * (d_key + d_value) for n, d_key, d_value in self.head_shapes)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the network; what a cache is compared by."""
        compared = {spec.name for spec in dataclasses.fields(self) if spec.compare}
        values = {name: value for name, value in self.to_dict().items() if name in compared}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "HookedConfig":
        """A copy with some fields changed, checked anew; an unknown field is a `TypeError`.

        What is equal to what it follows when left out goes on following: a final norm equal to `norm`, say. `mlp` and
        `attn_only` follow each other, where only one of the two is given.
        """
        follows = {
            "final_norm": ("norm", self.norm),
            "act_norm": ("norm", self.norm),
            "d_vocab_out": ("d_vocab", self.d_vocab),
        }
        left_out = {
            name for name, (other, value) in follows.items() if other in changes and getattr(self, name) == value
        }
        if changes.get("act_fn", self.act_fn) != self.act_fn:
            left_out |= {"act_norm", "swiglu_limit", "swiglu_alpha"}
        if "mlp" in changes:
            left_out.add("attn_only")
        elif changes.get("attn_only", self.attn_only) != self.attn_only:
            left_out.add("mlp")
        names = {spec.name for spec in dataclasses.fields(self)} - left_out
        return type(self)(**{**{name: getattr(self, name) for name in names}, **changes})

    def take_layers(self, layers: Sequence[int]) -> "HookedConfig":
        """The configuration of a network of some of the blocks, in the order given."""
        by_layer = {name: value for name in BY_LAYER if isinstance(value := getattr(self, name), tuple)}
        taken = {name: tuple(value[layer] for layer in layers) for name, value in by_layer.items()}
        # What is in the blocks decides anew whether any has an MLP; the final norm stays.
        return self.replace(
            **{**taken, "n_layers": len(layers), "final_norm": self.final_norm, "mlp": taken.get("mlp", self.mlp)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `HookedConfig.from_dict` reads them back to an equal config."""
        given = self.positions
        by_kind = [positions_to_dict(one) for one in given] if isinstance(given, tuple) else positions_to_dict(given)
        parts = {name: by_layer(lambda part: part and part.to_dict(), getattr(self, name)) for name in ("attn", "mlp")}
        return {**dataclasses.asdict(self), "positions": by_kind, **parts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HookedConfig":
        """Build a config from what `to_dict` gave (also after a trip through JSON).

        Raises:
            ConfigError: an unknown field or positions kind.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"config: unknown fields {unknown}; known ones are {sorted(known)}")
        fields = dict(values)
        for name, value in values.items():
            if name in BY_LAYER and isinstance(value, list | tuple):
                fields[name] = tuple(_read_field(name, one) for one in value)
            else:
                fields[name] = _read_field(name, value)
        return read_fields(cls, "config", fields)

    def to_json(self) -> str:
        """The configuration as JSON text, keys in field order."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "HookedConfig":
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_xlstm(cls, config: Mapping[str, Any] | str, *, n_ctx: int = 8192) -> "HookedConfig":
        """The network that a configuration of xlstm-jax's transformer describes.

        Args:
            config: its fields by name, as its `to_dict` gives them (with the text "None" for None) or as Hydra configs
                name them (`add_qk_norm`, `reset_at_document_boundaries`), or that as JSON. What is left out has the
                default that it has there.
            n_ctx: longest sequence the model accepts, of which the configuration says nothing: rotary goes on.

        Raises:
            ConfigError: fields are missing, unknown, or hold what they cannot; all are listed.
        """
        found: HookedConfig = translate("from_xlstm", config, n_ctx=n_ctx)
        return found

    def to_xlstm(self) -> dict[str, Any]:
        """The configuration of xlstm-jax's transformer that describes the network, as its own `to_dict` gives it.

        Fields that change no number (`parallel`, `dtype`, ...) are as they were read, or the defaults.

        Raises:
            UnsupportedModelError: none describes it; the fields that stand against it are listed.
        """
        fields: dict[str, Any] = translate("to_xlstm", self)
        return fields


def _read_field(name: str, value: Any) -> Any:
    """The value of a field, or of one layer of it, from plain JSON values."""
    kinds = {name: kind for name, kind in PARTS.items() if kind is not PartConfig}
    kinds["origin"] = Origin
    if value is None:
        return None
    if name == "positions":
        return positions_from_dict(value)
    if name in ("attn", "mlp"):
        return read_part(value, name)
    return read_fields(kinds[name], name, value) if name in kinds else value
