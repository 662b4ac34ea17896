"""The description of a network: `HookedConfig`.

All parts are frozen, keyword-only and checked when made. `None` means that the part is absent. Nothing
here knows where a checkpoint came from; adapters translate to and from these fields.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from hooklens.config.block import BlockConfig, PartConfig
from hooklens.config.checks import (
    check_choice,
    check_counts,
    check_flags,
    check_kind,
    check_numbers,
    check_present,
    read_fields,
)
from hooklens.config.description import Description, describe
from hooklens.config.norms import NormConfig
from hooklens.config.positions import (
    LearnedPositions,
    Positions,
    RotaryPositions,
    positions_from_dict,
    positions_to_dict,
)
from hooklens.errors import ConfigError

Wiring = Literal["sequential", "parallel"]
Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "silu"]
# Typed as the value that __post_init__ puts in its place, or misses.
_DERIVED: Any = None
_LAYER_NORM = NormConfig(kind="layer", eps=1e-5)
_SIZES = ("d_model", "n_heads", "d_vocab", "n_ctx")
_DERIVED_SIZES = ("n_kv_heads", "d_head", "d_mlp")
_FLAGS = (
    "gated_mlp",
    "shared_norm",
    "norm_before",
    "norm_after",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "unembed_bias",
    "tied_unembed",
)
_ATTENTION, _MLP = PartConfig(kind="attention"), PartConfig(kind="mlp")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a configuration came from: enough to write the same checkpoint format back.

    Attributes:
        family: name of the adapter that read it.
        hub_config: the checkpoint's own `config.json`, as JSON text.
    """

    family: str
    hub_config: str


@dataclass(frozen=True, kw_only=True)
class HookedConfig:
    """All that decides the network's computation and the shapes of its weights.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key-value heads; divides `n_heads`. None: `n_heads`.
        d_head: width of a head; need not be `d_model / n_heads`. None: `d_model // n_heads`.
        d_mlp: neurons of an MLP. None: `4 * d_model`.
        d_vocab: vocabulary entries.
        n_ctx: longest sequence the model accepts.
        act_fn: activation of the MLP. `gelu_tanh` is the tanh approximation.
        gated_mlp: `act(x W_gate) * (x W_in)` in place of `act(x W_in)`.
        wiring: `"sequential"` (attention, then MLP on the sum) or `"parallel"` (both read `resid_pre`).
        shared_norm: parallel wiring only: `ln1` feeds attention and MLP, there is no `ln2`.
        norm: the kind of all norms on the stream.
        norm_before: a norm at the entrance of each branch (`ln1`, `ln2`).
        norm_after: a norm at the exit of each branch (`ln1_post`, `ln2_post`).
        qk_norm: norm over each head's query and key, before rotary.
        positions: how positions enter. There is no default: none at all is asked for with `NoPositions()`.
        qkv_bias, out_bias, mlp_bias, unembed_bias: which linear maps have biases.
        attn_scale: factor on the scores. None: `d_head ** -0.5` (see `score_scale`).
        attn_softcap: `cap * tanh(scores / cap)` on the scaled scores.
        logits_softcap: the same on the logits.
        attn: the part that attends in each block.
        mlp: the part at the MLP's place.
        windows: per layer, how many of the latest keys a query may see; None in a layer: all.
        embed_scale: factor on the token embedding.
        tied_unembed: `W_U` is `W_E` transposed, one tensor.
        init_std: standard deviation of fresh weights.
        origin: where the configuration was read from; no part of equality.

    `positions`, `attn` and `mlp` may differ by layer: then they are tuples with an entry for each. `block(layer)` is
    the description of one layer.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    n_kv_heads: int = _DERIVED
    d_head: int = _DERIVED
    d_mlp: int = _DERIVED
    act_fn: Activation = "gelu"
    gated_mlp: bool = False
    wiring: Wiring = "sequential"
    shared_norm: bool = False
    norm: NormConfig = _LAYER_NORM
    norm_before: bool = True
    norm_after: bool = False
    qk_norm: NormConfig | None = None
    positions: Positions | tuple[Positions, ...] = _DERIVED
    attn: PartConfig | tuple[PartConfig, ...] = _ATTENTION
    mlp: PartConfig | tuple[PartConfig, ...] = _MLP
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logits_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    embed_scale: float | None = None
    tied_unembed: bool = False
    init_std: float = 0.02
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = vars(self)
        check_present("config", {name: given[name] for name in (*_SIZES, "n_layers", "init_std")})
        check_counts("config", {name: given[name] for name in (*_SIZES, *_DERIVED_SIZES)})
        check_counts("config", {"n_layers": self.n_layers}, at_least=0)
        check_flags("config", {name: given[name] for name in _FLAGS})
        check_numbers(
            "config",
            {
                "attn_scale": self.attn_scale,
                "attn_softcap": self.attn_softcap,
                "logits_softcap": self.logits_softcap,
                "embed_scale": self.embed_scale,
            },
        )
        check_numbers("config", {"init_std": self.init_std}, at_least=0.0)
        self._fill_in_sizes()
        check_choice("config: act_fn", self.act_fn, get_args(Activation))
        check_choice("config: wiring", self.wiring, get_args(Wiring))
        check_kind("config: norm", self.norm, NormConfig)
        if self.qk_norm is not None:
            check_kind("config: qk_norm", self.qk_norm, NormConfig)
        check_kind("config: attn", self.attn, PartConfig, by_layer=True)
        check_kind("config: mlp", self.mlp, PartConfig, by_layer=True)
        self._check_combinations()

    def _fill_in_sizes(self) -> None:
        given = vars(self)
        if given["n_kv_heads"] is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if given["d_head"] is None:
            if self.d_model % self.n_heads:
                raise ConfigError(
                    f"config: d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head"
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if given["d_mlp"] is None:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)

    def _check_combinations(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"config: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        if self.shared_norm and (self.wiring != "parallel" or not self.norm_before):
            raise ConfigError("config: shared_norm needs wiring='parallel' and norm_before=True")
        self._check_positions()
        if self.windows is not None and not isinstance(self.windows, tuple):
            raise ConfigError(f"config: windows={self.windows!r}; expected a tuple with one for each layer, or None")
        for name in ("windows", "positions", "attn", "mlp"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_layers:
                raise ConfigError(f"config: {name} has {len(value)} entries for {self.n_layers} layers")
        check_counts("config: windows", {f"layer {i}": size for i, size in enumerate(self.windows or ())})
        if self.tied_unembed and self.unembed_bias:
            raise ConfigError("config: a tied unembedding has no bias")

    def _check_positions(self) -> None:
        given: Any = self.positions
        several = isinstance(given, tuple)
        for one in given if several else (given,):
            if not isinstance(one, Positions):
                raise ConfigError(
                    f"config: positions={one!r}; expected RotaryPositions(...), AlibiPositions(), LearnedPositions(), "
                    "or NoPositions() for none at all"
                )
            if several and isinstance(one, LearnedPositions):
                raise ConfigError("config: learned positions enter below the blocks, so they cannot differ by layer")
            if isinstance(one, RotaryPositions) and one.dim > self.d_head:
                raise ConfigError(f"config: rotary dim {one.dim} is larger than d_head={self.d_head}")

    def block(self, layer: int) -> BlockConfig:
        """The description of one layer, counted from 0."""
        return BlockConfig(self, layer)

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
            "one": 1,
        }
        if isinstance(self.positions, LearnedPositions):
            sizes["position"] = self.n_ctx + self.positions.offset
        size = sizes.get(axis)
        if size is None:
            raise ConfigError(f"axis {axis!r} has no size of its own; the config fixes {', '.join(sizes)}")
        return size

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores: `attn_scale`, or `d_head ** -0.5` where that is None."""
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    def window(self, layer: int) -> int | None:
        """How many of the latest keys a query of this layer may see; None: all."""
        return None if self.windows is None else self.windows[layer]

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the network; what a cache is compared by."""
        values = {name: value for name, value in self.to_dict().items() if name != "origin"}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "HookedConfig":
        """A copy with some fields changed, checked anew; an unknown field is a `TypeError`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `HookedConfig.from_dict` reads them back to an equal config."""
        values = dataclasses.asdict(self)
        several = isinstance(self.positions, tuple)
        values["positions"] = (
            [positions_to_dict(one) for one in self.positions]  # type: ignore[union-attr]
            if several
            else positions_to_dict(self.positions)  # type: ignore[arg-type]
        )
        return values

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
        for name, part in (("norm", NormConfig), ("qk_norm", NormConfig), ("origin", Origin)):
            if fields.get(name) is not None:
                fields[name] = read_fields(part, name, fields[name])
        for name, read in (("positions", positions_from_dict), ("attn", _read_part), ("mlp", _read_part)):
            if (value := fields.get(name)) is not None:
                fields[name] = read(value) if isinstance(value, Mapping) else tuple(map(read, value))
        if fields.get("windows") is not None:
            fields["windows"] = tuple(fields["windows"])
        return read_fields(cls, "config", fields)

    def to_json(self) -> str:
        """The configuration as JSON text, keys in field order."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "HookedConfig":
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def _read_part(values: Mapping[str, Any]) -> PartConfig:
    return read_fields(PartConfig, "part", values)
