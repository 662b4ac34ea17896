"""The description of a network: `HookedConfig` and its nested parts.

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

from hooklens.errors import ConfigError

Wiring = Literal["sequential", "parallel"]
NormKind = Literal["layer", "rms"]
Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "silu"]
RotaryLayout = Literal["half", "interleaved"]
RotaryScalingKind = Literal["linear", "dynamic", "llama3", "yarn"]


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _check_positive(owner: str, **values: float | None) -> None:
    bad = {name: value for name, value in values.items() if value is not None and not value > 0}
    if bad:
        found = ", ".join(f"{name}={value!r}" for name, value in bad.items())
        raise ConfigError(f"{owner}: {found}; expected numbers above 0")


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        kind: `"layer"` (centre, scale, weight, bias) or `"rms"` (scale, weight; Zhang and Sennrich 2019).
        eps: added to the variance or mean square before the root.
        bias: whether a LayerNorm has a bias `b`.
        unit_offset: the weight acts as `1 + w`.
    """

    kind: NormKind
    eps: float
    bias: bool = True
    unit_offset: bool = False

    def __post_init__(self) -> None:
        _check_choice("norm kind", self.kind, get_args(NormKind))
        if self.eps < 0:
            raise ConfigError(f"norm eps is {self.eps!r}; expected a number >= 0")
        if self.kind == "rms" and self.bias:
            raise ConfigError("an RMSNorm has no bias: set bias=False")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched past the length a model was first trained on.

    Attributes:
        kind: `"linear"` (Chen et al. 2023), `"dynamic"` (NTK-aware, depends on the sequence's length),
            `"llama3"` (Llama 3.1), `"yarn"` (Peng et al. 2023).
        factor: the stretch.
        original_n_ctx: length trained on before stretching (`dynamic`, `llama3`, `yarn`).
        low_freq_factor, high_freq_factor: `llama3` only.
        beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: `yarn` only.
    """

    kind: RotaryScalingKind
    factor: float
    original_n_ctx: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_choice("rotary scaling kind", self.kind, get_args(RotaryScalingKind))
        _check_positive("rotary scaling", factor=self.factor, original_n_ctx=self.original_n_ctx)
        if self.kind != "linear" and self.original_n_ctx is None:
            raise ConfigError(f"rotary scaling {self.kind!r} needs original_n_ctx")
        if self.kind == "llama3" and (self.low_freq_factor is None or self.high_freq_factor is None):
            raise ConfigError("rotary scaling 'llama3' needs low_freq_factor and high_freq_factor")


@dataclass(frozen=True, kw_only=True)
class RotaryPositions:
    """Rotary position embedding (Su et al. 2021) on the first `dim` entries of each head.

    Attributes:
        dim: rotated entries of a head, even.
        base: wavelength base (theta).
        layout: `"half"` pairs entry i with i + dim/2, `"interleaved"` pairs 2i with 2i + 1.
        scaling: frequency stretch, None for none.
    """

    dim: int
    base: float = 10000.0
    layout: RotaryLayout = "half"
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        _check_choice("rotary layout", self.layout, get_args(RotaryLayout))
        _check_positive("rotary positions", dim=self.dim, base=self.base)
        if self.dim % 2:
            raise ConfigError(f"rotary dim is {self.dim}; expected an even number")


@dataclass(frozen=True, kw_only=True)
class AlibiPositions:
    """Attention with linear biases (Press et al. 2022): a head's slope times the key position.

    Attributes:
        scaled: the bias is multiplied by the attention scale together with the scores.
        bfloat16: slope and product are rounded to bfloat16, as some reference code does.
    """

    scaled: bool = False
    bfloat16: bool = False


@dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A learned vector per position, `embed.W_pos`.

    Attributes:
        offset: rows of the table before position 0.
    """

    offset: int = 0


Positions = RotaryPositions | AlibiPositions | LearnedPositions
# Typed as the int that __post_init__ puts in its place.
_DERIVED: Any = None
_POSITION_KINDS: dict[str, type[Positions]] = {
    "rotary": RotaryPositions,
    "alibi": AlibiPositions,
    "learned": LearnedPositions,
}


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
        positions: how positions enter, None for not at all.
        qkv_bias, out_bias, mlp_bias, unembed_bias: which linear maps have biases.
        attn_scale: factor on the scores. None: `d_head ** -0.5` (see `score_scale`).
        attn_softcap: `cap * tanh(scores / cap)` on the scaled scores.
        logits_softcap: the same on the logits.
        windows: per layer, how many of the latest keys a query may see; None in a layer: all.
        embed_scale: factor on the token embedding.
        tied_unembed: `W_U` is `W_E` transposed, one tensor.
        init_std: standard deviation of fresh weights.
        origin: where the configuration was read from; no part of equality.
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
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    norm_before: bool = True
    norm_after: bool = False
    qk_norm: NormConfig | None = None
    positions: Positions | None = None
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
        _check_positive(
            "config", d_model=self.d_model, n_heads=self.n_heads, d_vocab=self.d_vocab, n_ctx=self.n_ctx,
            n_kv_heads=self.n_kv_heads, d_head=self.d_head, d_mlp=self.d_mlp, attn_scale=self.attn_scale,
            attn_softcap=self.attn_softcap, logits_softcap=self.logits_softcap,
        )  # fmt: skip
        if self.n_layers < 0:
            raise ConfigError(f"config: n_layers={self.n_layers!r}; expected a number >= 0")
        self._fill_in_sizes()
        _check_choice("config: act_fn", self.act_fn, get_args(Activation))
        _check_choice("config: wiring", self.wiring, get_args(Wiring))
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
        if isinstance(self.positions, RotaryPositions) and self.positions.dim > self.d_head:
            raise ConfigError(f"config: rotary dim {self.positions.dim} is larger than d_head={self.d_head}")
        if self.windows is not None and len(self.windows) != self.n_layers:
            raise ConfigError(f"config: windows has {len(self.windows)} entries for {self.n_layers} layers")
        if self.tied_unembed and self.unembed_bias:
            raise ConfigError("config: a tied unembedding has no bias")

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
        for kind, part in _POSITION_KINDS.items():
            if isinstance(self.positions, part):
                values["positions"] = {"kind": kind, **values["positions"]}
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
                fields[name] = part(**fields[name])
        if fields.get("positions") is not None:
            positions = dict(fields["positions"])
            kind = positions.pop("kind", None)
            _check_choice("config: positions kind", str(kind), tuple(_POSITION_KINDS))
            if positions.get("scaling") is not None:
                positions["scaling"] = RotaryScaling(**positions["scaling"])
            fields["positions"] = _POSITION_KINDS[str(kind)](**positions)
        if fields.get("windows") is not None:
            fields["windows"] = tuple(fields["windows"])
        return cls(**fields)

    def to_json(self) -> str:
        """The configuration as JSON text, keys in field order."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "HookedConfig":
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))
