"""How positions enter a network."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hooklens.config.checks import check_choice, check_counts, check_flags, check_numbers, check_present, read_fields
from hooklens.errors import ConfigError

RotaryLayout = Literal["half", "interleaved"]
RotaryScalingKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
SinusoidalLayout = Literal["interleaved", "half"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched past the length a model was first trained on.

    Attributes:
        kind: `"linear"` (Chen et al. 2023), `"dynamic"` (NTK-aware, depends on the sequence's length),
            `"llama3"` (Llama 3.1), `"yarn"` (Peng et al. 2023), `"longrope"` (Ding et al. 2024; depends on the
            sequence's length).
        factor: the stretch.
        original_n_ctx: length trained on before stretching (all kinds but `linear`).
        low_freq_factor, high_freq_factor: `llama3` only.
        attention_factor: on cosines and sines (`yarn`, `longrope`). None: what the kind's paper derives from `factor`.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: `yarn` only.
        short_factors, long_factors: `longrope` only: what each frequency is divided by, in sequences of up to
            `original_n_ctx` tokens and in longer ones, at all their positions.
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
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("rotary scaling kind", self.kind, get_args(RotaryScalingKind))
        check_counts("rotary scaling", {"original_n_ctx": self.original_n_ctx})
        check_numbers(
            "rotary scaling",
            {
                "factor": self.factor,
                "low_freq_factor": self.low_freq_factor,
                "beta_fast": self.beta_fast,
                "high_freq_factor": self.high_freq_factor,
                "beta_slow": self.beta_slow,
            },
        )
        check_numbers(
            "rotary scaling",
            {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim, "attention_factor": self.attention_factor},
            at_least=0.0,
        )
        if self.kind != "linear" and self.original_n_ctx is None:
            raise ConfigError(f"rotary scaling {self.kind!r} needs original_n_ctx")
        if self.kind == "llama3" and (self.low_freq_factor is None or self.high_freq_factor is None):
            raise ConfigError("rotary scaling 'llama3' needs low_freq_factor and high_freq_factor")
        self._check_factors()

    def _check_factors(self) -> None:
        given = {"short_factors": self.short_factors, "long_factors": self.long_factors}
        if self.kind != "longrope":
            if found := [name for name, factors in given.items() if factors is not None]:
                raise ConfigError(f"rotary scaling {self.kind!r} has no {' and '.join(found)}: leave them out")
            return
        for name, factors in given.items():
            if not isinstance(factors, tuple) or not factors:
                raise ConfigError(
                    f"rotary scaling 'longrope': {name}={factors!r}; expected a tuple of numbers, one for each "
                    "frequency (dim / 2)"
                )
            check_present(f"rotary scaling: {name}", {f"frequency {i}": one for i, one in enumerate(factors)})
            check_numbers(f"rotary scaling: {name}", {f"frequency {i}": one for i, one in enumerate(factors)})


@dataclass(frozen=True, kw_only=True)
class RotaryPositions:
    """Rotary position embedding (Su et al. 2021) on the first `dim` entries of each head.

    Attributes:
        dim: rotated entries of a head, even.
        base: wavelength base (theta).
        layout: `"half"` pairs entry i with i + dim/2, `"interleaved"` pairs 2i with 2i + 1.
        scaling: frequency stretch, None for none.
        reverse: turns the other way, by minus the angle: pairs (a, b) become (a cos + b sin, b cos - a sin).
    """

    dim: int
    base: float = 10000.0
    layout: RotaryLayout = "half"
    scaling: RotaryScaling | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        check_choice("rotary layout", self.layout, get_args(RotaryLayout))
        check_flags("rotary positions", {"reverse": self.reverse})
        check_counts("rotary positions", {"dim": self.dim})
        check_numbers("rotary positions", {"base": self.base})
        if self.dim % 2:
            raise ConfigError(f"rotary dim is {self.dim}; expected an even number")
        if self.scaling is None:
            return
        for factors in (self.scaling.short_factors, self.scaling.long_factors):
            if factors is not None and len(factors) != self.dim // 2:
                raise ConfigError(
                    f"rotary scaling has {len(factors)} factors; expected one for each of the {self.dim // 2} "
                    f"frequencies of rotary dim {self.dim}"
                )


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
    """A learned vector per position, `pos_embed.W_pos`, added to the token embedding.

    Attributes:
        offset: rows of the table before position 0.
    """

    offset: int = 0

    def __post_init__(self) -> None:
        check_counts("learned positions", {"offset": self.offset}, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ShortformerPositions:
    """A learned vector per position, `pos_embed.W_pos`, added to what queries and keys read (Press et al. 2021).

    Behind the norm before attention, in every layer; the stream, and with it values and MLPs, knows no positions.

    Attributes:
        offset: rows of the table before position 0.
    """

    offset: int = 0

    def __post_init__(self) -> None:
        check_counts("shortformer positions", {"offset": self.offset}, at_least=0)


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositions:
    """A fixed vector per position, sines and cosines of it (Vaswani et al. 2017), added to the token embedding.

    The wave of pair `j` of `d_model / 2` has the angle `position / base ** (2 j / d_model)`. There is no parameter.

    Attributes:
        base: wavelength base.
        layout: `"interleaved"` has the sine of pair j at entry 2j and its cosine at 2j + 1, as in the paper; `"half"`
            all sines, then all cosines.
        includes_base: the last pair's wave is `position / base` itself, that of pair `j` is
            `position / base ** (j / (d_model / 2 - 1))`, as in the paper's own code (tensor2tensor).
        offset: added to positions.
    """

    base: float = 10000.0
    layout: SinusoidalLayout = "interleaved"
    includes_base: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        check_choice("sinusoidal layout", self.layout, get_args(SinusoidalLayout))
        check_present("sinusoidal positions", {"base": self.base, "offset": self.offset})
        check_numbers("sinusoidal positions", {"base": self.base})
        check_flags("sinusoidal positions", {"includes_base": self.includes_base})
        check_counts("sinusoidal positions", {"offset": self.offset}, at_least=0)


@dataclass(frozen=True, kw_only=True)
class NoPositions:
    """No positions: attention tells tokens apart by the causal mask alone."""


Positions = (
    RotaryPositions | AlibiPositions | LearnedPositions | ShortformerPositions | SinusoidalPositions | NoPositions
)

_KINDS: dict[str, type[Positions]] = {
    "rotary": RotaryPositions,
    "alibi": AlibiPositions,
    "learned": LearnedPositions,
    "shortformer": ShortformerPositions,
    "sinusoidal": SinusoidalPositions,
    "none": NoPositions,
}


def positions_to_dict(positions: Positions) -> dict[str, Any]:
    """Plain JSON-able values, with the kind."""
    kind = next(kind for kind, part in _KINDS.items() if isinstance(positions, part))
    return {"kind": kind, **asdict(positions)}


def positions_from_dict(values: Mapping[str, Any]) -> Positions:
    """Read what `positions_to_dict` gave.

    Raises:
        ConfigError: an unknown kind, or unknown fields.
    """
    fields = dict(values)
    kind = str(fields.pop("kind", None))
    check_choice("config: positions kind", kind, tuple(_KINDS))
    if fields.get("scaling") is not None:
        fields["scaling"] = read_fields(RotaryScaling, "rotary scaling", _with_tuples(fields["scaling"]))
    found = read_fields(_KINDS[kind], "positions", fields)
    assert isinstance(found, Positions)
    return found


def _with_tuples(values: object) -> object:
    """Fields with tuples where JSON has lists."""
    if not isinstance(values, Mapping):
        return values
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
