"""Config parts for positions: rotary in transformers' old and new spellings with its scalings, ALiBi, and fixed ones.

transformers 4 writes `rope_theta` (GPT-NeoX: `rotary_emb_base`, `rotary_pct`) and `rope_scaling`;
transformers 5 writes one object `rope_parameters`. Where several are given they rank as transformers 5
ranks them: `rope_scaling` before `rope_parameters`, and the object's entries before the flat keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hooklens.adapters.keys.parts import Computed, Key
from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.config import (
    AlibiPositions,
    Positions,
    QueryTemperature,
    RotaryLayout,
    RotaryPositions,
    RotaryScaling,
)

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_SPELLINGS = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"
# YaRN's optional parameters: names in transformers and here.
_LONGROPE_LISTS = {"short_factors": "short_factor", "long_factors": "long_factor"}
_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True)
class PositionKeys:
    """Positions and context length: `positions` and `n_ctx`, and `query_temperature` where families have one.

    Comes after the parts that give the head sizes.

    Attributes:
        n_ctx: key of the context length.
        default_n_ctx: what transformers takes where it is absent.
        base: flat key of the wavelength base; None: it is fixed.
        default_base: what transformers takes where the base is absent.
        fraction: flat key of the rotated fraction of a head; None for families that rotate whole heads.
        default_fraction: what transformers takes where the fraction is absent.
        layout: how entries are paired.
        alibi: flag that replaces rotary by ALiBi; None for families without it.
        default_rope: the object `rope_parameters` that transformers takes where none is given, whatever flat keys say
            that is in it.
        default_original: the length trained on before stretching that transformers takes where its flat key is absent;
            the flat key is then written, since the object's entry counts for nothing. None: the object has it.
        temperature: entry of the object that says how fast the temperature of queries grows; None: there is none.
        kinds: names of scalings that mean another one in this family.
        scalings: names of the scalings that this family has.
        alpha: a `dynamic` scaling with `alpha` is a larger base, whatever the length (Hunyuan).
        reverse: rotary turns the other way (nanochat).
    """

    n_ctx: str = "max_position_embeddings"
    default_n_ctx: int = 2048
    base: str | None = "rope_theta"
    default_base: float = 10000.0
    fraction: str | None = None
    default_fraction: float = 1.0
    layout: RotaryLayout = "half"
    alibi: str | None = None
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    default_original: int | None = None
    temperature: str | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    scalings: tuple[str, ...] = _KINDS
    alpha: bool = False
    reverse: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        optional = [key for key in (self.base, self.fraction, self.alibi) if key is not None]
        return (self.n_ctx, "rope_parameters", "rope_scaling", _ORIGINAL, *optional)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `positions` and `n_ctx`."""
        n_ctx = reader.get(self.n_ctx, int, self.default_n_ctx)
        if self.alibi is not None and reader.get(self.alibi, bool, False):
            reader.used.update(self.keys)
            # What transformers computes: slopes and products in bfloat16, scaled together with the scores.
            return {"n_ctx": n_ctx, "positions": AlibiPositions(scaled=True, bfloat16=True)}
        rope = self.open_rope(reader)
        positions, n_ctx = self.read_rotary(reader, rope, fields, n_ctx=n_ctx)
        if positions is None:
            return {}
        temperature = {} if self.temperature is None else self._read_temperature(self.temperature, rope, positions)
        return {} if reader.problems else {"n_ctx": n_ctx, "positions": positions, **temperature}

    def open_rope(self, reader: ConfigReader) -> ConfigReader:
        """A reader of the object that describes the rotation."""
        spelling = next((key for key in _SPELLINGS if reader.get(key, dict, {})), "rope_parameters")
        reader.used.update(_SPELLINGS)
        default = {} if any(reader.has(key) for key in _SPELLINGS) else self.default_rope
        return reader.nested(spelling, default)

    def read_rotary(
        self, reader: ConfigReader, rope: ConfigReader, fields: Mapping[str, Any], *, n_ctx: int
    ) -> tuple[RotaryPositions | None, int]:
        """The rotation that an object describes, and the context length it gives; None where that is no rotation.

        Args:
            reader: of the config, whose flat keys count where the object is silent.
            rope: of the object.
            fields: those of the parts before.
            n_ctx: the context length that the config gives.
        """
        flat_base = self.default_base
        if self.base is not None:
            flat_base = reader.get(self.base, float, self.default_base)
        flat_fraction = self.default_fraction
        if self.fraction is not None:
            flat_fraction = reader.get(self.fraction, float, self.default_fraction)
        flat_original = reader.get(_ORIGINAL, int, self.default_original)
        base = rope.get("rope_theta", float, flat_base)
        fraction = rope.get("partial_rotary_factor", float, flat_fraction)
        if self.fraction is None and fraction != 1.0:
            rope.reject("partial_rotary_factor", "1.0, since this family rotates whole heads")
        d_head = fields.get("d_head") or fields.get("d_model", 1) // max(fields.get("n_heads", 1), 1)
        dim = int(d_head * fraction)
        alpha = rope.get("alpha", float, None) if self.alpha else None
        if alpha and rope.kind_is("dynamic"):
            rope.used.update({"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})
            scaling, base = None, base * alpha ** (dim / (dim - 2))
        else:
            kind = self._read_kind(rope)
            scaling, n_ctx = _read_scaling(rope, kind, n_ctx=n_ctx, flat_original=flat_original)
        if reader.problems:
            return None, n_ctx
        turns = RotaryPositions(dim=dim, base=base, layout=self.layout, scaling=scaling, reverse=self.reverse)
        return turns, n_ctx

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the transformers 5 spelling."""
        positions, n_ctx = fields["positions"], fields["n_ctx"]
        alibi = {} if self.alibi is None else {self.alibi: isinstance(positions, AlibiPositions)}
        if not isinstance(positions, RotaryPositions):
            return {self.n_ctx: n_ctx, **alibi}
        if positions.scaling is not None and positions.scaling.kind == "dynamic":
            n_ctx = positions.scaling.original_n_ctx
        rope = self.write_rotary(positions, fields)
        original = {} if self.default_original is None or _ORIGINAL not in rope else {_ORIGINAL: rope[_ORIGINAL]}
        if self.temperature is not None:
            rope |= _write_temperature(self.temperature, fields["query_temperature"], rope.get(_ORIGINAL, n_ctx))
        return {self.n_ctx: n_ctx, "rope_parameters": rope, **original, **alibi}

    def write_rotary(self, positions: RotaryPositions, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The object that describes a rotation."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": positions.base}
        if self.fraction is not None:
            rope["partial_rotary_factor"] = _fraction_of(positions.dim, fields["d_head"])
        return rope if positions.scaling is None else {**rope, **_write_scaling(positions.scaling)}

    def _read_kind(self, rope: ConfigReader) -> str:
        """The kind of scaling that the object names."""
        rope.used.update({"finetuned", "type"})
        name: str = rope.get("rope_type", str, None) or rope.get("type", str, "default")
        kind = self.kinds.get(name, name)
        if kind in self.scalings:
            return kind
        rope.reject("rope_type" if rope.has("rope_type") else "type", f"one of {', '.join(map(repr, self.scalings))}")
        return "default"

    @staticmethod
    def _read_temperature(key: str, rope: ConfigReader, positions: RotaryPositions) -> dict[str, Any]:
        """The temperature, which counts in the length that a scaling stretches; one that never grows is none."""
        scale = rope.get(key, float)
        # Written there by some, and read by nobody.
        rope.used.add("max_position_embeddings")
        if not scale:
            return {"query_temperature": None}
        original = None if positions.scaling is None else positions.scaling.original_n_ctx
        length = rope.get(_ORIGINAL, int) if original is None else original
        return {} if rope.problems else {"query_temperature": QueryTemperature(scale=scale, length=length)}


@dataclass(frozen=True, kw_only=True)
class FixedPositionKeys:
    """Positions that are the same in every checkpoint of a family, and their length: `positions` and `n_ctx`.

    Attributes:
        positions: learned ones, sinusoids, ALiBi.
        n_ctx: key of the length.
        default_n_ctx: what transformers takes where it is absent.
        alias: another spelling of the key, which wins where both are given.
    """

    positions: Positions
    n_ctx: str = "max_position_embeddings"
    default_n_ctx: int = 2048
    alias: str | None = None

    @property
    def _length(self) -> Key:
        return Key(self.n_ctx, "n_ctx", int, default=self.default_n_ctx, alias=self.alias)

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its other spelling."""
        return self._length.keys

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `n_ctx`, and give `positions`."""
        return {**self._length.read(reader, fields), "positions": self.positions}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the length; other positions differ from what is read back, and are refused there."""
        return self._length.write(fields)


def rotary_dim_keys(
    *, n_ctx: str, alias: str, dim: str = "rotary_dim", layout: RotaryLayout = "interleaved"
) -> Computed:
    """A rotation of which the config gives the rotated entries of a head and nothing else: `positions` and `n_ctx`.

    Args:
        n_ctx: key of the context length.
        alias: another spelling of that key, which wins where both are given.
        dim: key of the rotated entries.
        layout: how entries are paired.
    """
    length = Key(n_ctx, "n_ctx", int, default=2048, alias=alias)

    def read(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        read_length, width = length.read(reader, fields), reader.get(dim, int)
        return {} if reader.problems else {**read_length, "positions": RotaryPositions(dim=width, layout=layout)}

    def write(fields: Mapping[str, Any]) -> dict[str, Any]:
        positions = fields["positions"]
        # Another rotation, or none, differs from what is read back, and is refused there.
        return {**length.write(fields), dim: positions.dim if isinstance(positions, RotaryPositions) else 0}

    return Computed((*length.keys, dim), read, write)


def _read_scaling(
    rope: ConfigReader, kind: str, *, n_ctx: int, flat_original: int | None
) -> tuple[RotaryScaling | None, int]:
    """The scaling that the rope object describes, and the context length it gives."""
    nested_original = rope.get(_ORIGINAL, int, n_ctx)
    if kind == "default":
        rope.used.add("factor")
        return None, n_ctx
    original = flat_original or nested_original or n_ctx
    factor = rope.get("factor", float, n_ctx / original if kind in ("yarn", "longrope") else REQUIRED)
    read: dict[str, Any] = {"kind": kind, "factor": factor, "original_n_ctx": original}
    if kind == "linear":
        del read["original_n_ctx"]
    elif kind == "dynamic":
        # Frequencies begin to move past max_position_embeddings, whatever the object says of an original length.
        read["original_n_ctx"], n_ctx = n_ctx, int(factor * n_ctx)
    elif kind == "llama3":
        read |= {name: rope.get(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    elif kind == "longrope":
        read |= {ours: tuple(map(float, rope.entries(name, float))) for ours, name in _LONGROPE_LISTS.items()}
        read["attention_factor"] = rope.get("attention_factor", float, None)
    elif kind == "yarn":
        # transformers takes a zero or null beta as absent, and HookedConfig's own defaults are the paper's, as there.
        numbers = {name: rope.get(name, float, None) for name in _YARN_NUMBERS}
        read |= {name: value for name, value in numbers.items() if value or (value is not None and "beta" not in name)}
        read["truncate"] = rope.get("truncate", bool, True)
    return (None if rope.problems else RotaryScaling(**read)), n_ctx


def _write_scaling(scaling: RotaryScaling) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        written[_ORIGINAL] = scaling.original_n_ctx
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "longrope":
        written |= {name: list(getattr(scaling, ours)) for ours, name in _LONGROPE_LISTS.items()}
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    if scaling.kind == "yarn":
        numbers = {name: getattr(scaling, name) for name in _YARN_NUMBERS}
        written |= {name: value for name, value in numbers.items() if value is not None}
        written["truncate"] = scaling.truncate
    return written


def _write_temperature(key: str, temperature: object, original: int) -> dict[str, Any]:
    """The entries of a temperature; transformers reads the length where it does not grow, too."""
    # What differs by layer, or counts in another length, differs from what is read back, and is refused there.
    if not isinstance(temperature, QueryTemperature):
        return {key: 0.0, _ORIGINAL: original}
    return {key: temperature.scale, _ORIGINAL: temperature.length}


def _fraction_of(dim: int, d_head: int) -> float:
    """The fraction of a head for which `int(d_head * fraction)` is `dim` again."""
    fraction = dim / d_head
    return fraction if int(d_head * fraction) == dim else math.nextafter(fraction, math.inf)
