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
    refuse,
)
from hooklens.config.description import Description, describe
from hooklens.config.norms import NormConfig
from hooklens.config.positions import (
    AlibiPositions,
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
# The same where None says that there is none.
_LEFT_OUT: Any = object()
_LAYER_NORM = NormConfig(kind="layer", eps=1e-5)
_SIZES = ("d_model", "n_heads", "d_vocab", "n_ctx")
_DERIVED_SIZES = ("n_kv_heads", "d_head", "d_mlp")
_FLAGS = (
    "gated_mlp",
    "shared_norm",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "unembed_bias",
    "tied_unembed",
    "causal",
)
_FLAGS_BY_LAYER = ("norm_before", "norm_after")
_BY_LAYER = (*_FLAGS_BY_LAYER, "norm", "qk_norm", "positions", "attn", "mlp", "windows")
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
        norm: the kind of the norms around the branches. None: no norms there.
        norm_before: a norm at the entrance of each branch (`ln1`, `ln2`).
        norm_after: a norm at the exit of each branch (`ln1_post`, `ln2_post`).
        final_norm: the kind of `ln_final`; None: the unembedding reads the stream as it is. Left out: `norm`, where
            that is the same in all layers.
        qk_norm: norm over each head's query and key, before rotary. None: none.
        positions: how positions enter. There is no default: none at all is asked for with `NoPositions()`.
        qkv_bias, out_bias, mlp_bias, unembed_bias: which linear maps have biases.
        attn_scale: factor on the scores. None: `d_head ** -0.5` (see `score_scale`).
        attn_softcap: `cap * tanh(scores / cap)` on the scaled scores.
        logits_softcap: the same on the logits.
        attn: the part that attends in each block. None: none.
        mlp: the part at the MLP's place. None: none.
        attn_only: no block has an MLP; short for `mlp=None`.
        windows: per layer, how many of the latest keys a query may see, its own included; None in a layer: all.
            Without causality, of those on either side: keys less than so many positions away.
        causal: no query sees a later key. False: every query sees every token of its row.
        embed_scale: factor on the token embedding.
        tied_unembed: `W_U` is `W_E` transposed, one tensor.
        init_std: standard deviation of fresh weights.
        origin: where the configuration was read from; no part of equality.

    `attn`, `mlp`, `norm`, `norm_before`, `norm_after`, `qk_norm` and `positions` may differ by layer: then they are
    tuples with an entry for each. `block(layer)` is the description of one layer. A branch that a layer lacks has no
    norms there, and other settings of it have no effect.

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
    act_fn: Activation = "gelu"
    gated_mlp: bool = False
    wiring: Wiring = "sequential"
    shared_norm: bool = False
    norm: NormConfig | tuple[NormConfig | None, ...] | None = _LAYER_NORM
    norm_before: bool | tuple[bool, ...] = True
    norm_after: bool | tuple[bool, ...] = False
    final_norm: NormConfig | None = _LEFT_OUT
    qk_norm: NormConfig | tuple[NormConfig | None, ...] | None = None
    positions: Positions | tuple[Positions, ...] = _DERIVED
    attn: PartConfig | tuple[PartConfig | None, ...] | None = _ATTENTION
    mlp: PartConfig | tuple[PartConfig | None, ...] | None = _LEFT_OUT
    attn_only: bool = _DERIVED
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logits_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
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
        for name in _FLAGS_BY_LAYER:
            each = given[name] if isinstance(given[name], tuple) else (given[name],)
            check_flags(f"config: {name}", {f"layer {i}" if len(each) > 1 else name: one for i, one in enumerate(each)})
        if given["attn_only"] is not None:
            check_flags("config", {"attn_only": self.attn_only})
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
        for name, kind in (("norm", NormConfig), ("qk_norm", NormConfig), ("attn", PartConfig), ("mlp", PartConfig)):
            if given[name] is not _LEFT_OUT:
                check_kind(f"config: {name}", given[name], kind)
        if given["final_norm"] is not _LEFT_OUT:
            check_kind("config: final_norm", self.final_norm, NormConfig, by_layer=False)
        refuse([*self._fill_in_parts(), *self._combination_problems()], "config")

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

    def _fill_in_parts(self) -> list[str]:
        """Settle what says the same twice, or follows from what was given; what contradicts itself comes back."""
        problems = []
        mlp: Any = self.mlp
        final_norm: Any = self.final_norm
        attn_only: bool | None = self.attn_only
        if mlp is _LEFT_OUT:
            mlp = None if attn_only else _MLP
        without_mlps = mlp is None or (isinstance(mlp, tuple) and bool(mlp) and all(one is None for one in mlp))
        if attn_only is not None and attn_only != without_mlps:
            problems.append(f"attn_only={attn_only} and mlp={mlp!r} contradict each other; leave one of the two out")
        if final_norm is _LEFT_OUT:
            final_norm = self.norm
            if isinstance(self.norm, tuple):
                problems.append("norm differs by layer: give final_norm, a NormConfig(...) or None, too")
        object.__setattr__(self, "mlp", mlp)
        object.__setattr__(self, "attn_only", without_mlps)
        object.__setattr__(self, "final_norm", final_norm)
        return problems

    def _combination_problems(self) -> list[str]:
        problems = []
        if self.n_heads % self.n_kv_heads:
            problems.append(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        windows: Any = self.windows
        if not isinstance(windows, tuple | None):
            problems.append(f"windows={windows!r}; expected a tuple with one for each layer, or None")
        elif windows is not None:
            check_counts("config: windows", {f"layer {i}": size for i, size in enumerate(windows)})
        misfits = [
            f"{name} has {len(value)} entries for {self.n_layers} layers"
            for name in _BY_LAYER
            if isinstance(value := getattr(self, name), tuple) and len(value) != self.n_layers
        ]
        if self.tied_unembed and self.unembed_bias:
            problems.append("a tied unembedding has no bias")
        # What follows asks layer by layer.
        return [*problems, *misfits, *self._position_problems(), *([] if misfits else self._norm_problems())]

    def _norm_problems(self) -> list[str]:
        problems = []
        # Where all layers are alike, one stands for all: their number may be any that somebody wrote into a file.
        differ = any(isinstance(getattr(self, name), tuple) for name in _BY_LAYER)
        blocks = [self.block(layer) for layer in range(self.n_layers if differ else min(1, self.n_layers))]
        asked = self.norm_after if isinstance(self.norm_after, tuple) else (self.norm_after,) * len(blocks)
        unsaid = [block.layer for block in blocks if asked[block.layer] and block.norm is None]
        if unsaid:
            where = f"layers {unsaid}" if differ else "every layer"
            problems.append(f"norm_after asks for norms in {where}, where norm is None")
        if self.shared_norm and (self.wiring != "parallel" or not all(block.norm_before for block in blocks)):
            problems.append("shared_norm needs wiring='parallel', and norm_before=True with a norm in every layer")
        return problems

    def _position_problems(self) -> list[str]:
        given: Any = self.positions
        several = isinstance(given, tuple)
        problems = []
        for one in given if several else (given,):
            if not isinstance(one, Positions):
                problems.append(
                    f"positions={one!r}; expected RotaryPositions(...), AlibiPositions(), LearnedPositions(), "
                    "or NoPositions() for none at all"
                )
            if several and isinstance(one, LearnedPositions):
                problems.append("learned positions enter below the blocks, so they cannot differ by layer")
            if isinstance(one, AlibiPositions) and not self.causal:
                problems.append(
                    "linear biases with causal=False: they are defined for keys that stand before the query "
                    "(Press et al. 2022); give other positions"
                )
            if isinstance(one, RotaryPositions) and one.dim > self.d_head:
                problems.append(f"rotary dim {one.dim} is larger than d_head={self.d_head}")
        return list(dict.fromkeys(problems))

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
        return self.block(layer).window

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """Key-value heads of each layer, 0 where it has no attention."""
        return tuple(0 if block.attn is None else self.n_kv_heads for block in self.blocks)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the network; what a cache is compared by."""
        values = {name: value for name, value in self.to_dict().items() if name != "origin"}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "HookedConfig":
        """A copy with some fields changed, checked anew; an unknown field is a `TypeError`.

        A final norm equal to `norm` follows a new `norm`, and `mlp` and `attn_only` each other, where only one of the
        two is given.
        """
        left_out = set()
        if "norm" in changes and self.final_norm == self.norm:
            left_out.add("final_norm")
        if "mlp" in changes:
            left_out.add("attn_only")
        elif changes.get("attn_only", self.attn_only) != self.attn_only:
            left_out.add("mlp")
        names = {spec.name for spec in dataclasses.fields(self)} - left_out
        return type(self)(**{**{name: getattr(self, name) for name in names}, **changes})

    def take_layers(self, layers: Sequence[int]) -> "HookedConfig":
        """The configuration of a network of some of the blocks, in the order given."""
        by_layer = {name: value for name in _BY_LAYER if isinstance(value := getattr(self, name), tuple)}
        taken = {name: tuple(value[layer] for layer in layers) for name, value in by_layer.items()}
        # What is in the blocks decides anew whether any has an MLP; the final norm stays.
        return self.replace(
            **{**taken, "n_layers": len(layers), "final_norm": self.final_norm, "mlp": taken.get("mlp", self.mlp)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `HookedConfig.from_dict` reads them back to an equal config."""
        given = self.positions
        by_kind = [positions_to_dict(one) for one in given] if isinstance(given, tuple) else positions_to_dict(given)
        return {**dataclasses.asdict(self), "positions": by_kind}

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
            if name in _BY_LAYER and isinstance(value, list | tuple):
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


def _read_field(name: str, value: Any) -> Any:
    """The value of a field, or of one layer of it, from plain JSON values."""
    kinds = {
        "norm": NormConfig,
        "final_norm": NormConfig,
        "qk_norm": NormConfig,
        "attn": PartConfig,
        "mlp": PartConfig,
        "origin": Origin,
    }
    if value is None:
        return None
    if name == "positions":
        return positions_from_dict(value)
    return read_fields(kinds[name], name, value) if name in kinds else value
