"""The config part for positions: rotary in transformers' old and new spellings, its scalings, and ALiBi.

transformers 4 writes `rope_theta` (GPT-NeoX: `rotary_emb_base`, `rotary_pct`) and `rope_scaling`;
transformers 5 writes one object `rope_parameters`. Where several are given they rank as transformers 5
ranks them: `rope_scaling` before `rope_parameters`, and the object's entries before the flat keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hooklens.adapters.config_map import REQUIRED, ConfigReader
from hooklens.config import AlibiPositions, RotaryPositions, RotaryScaling

_DEFAULT_BASE = 10000.0
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
# YaRN's optional parameters: names in transformers and here.
_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True)
class PositionKeys:
    """Positions and context length: `positions` and `n_ctx`. Comes after the parts that give the head sizes.

    Attributes:
        base: flat key of the wavelength base.
        fraction: flat key of the rotated fraction of a head; None for families that rotate whole heads.
        default_fraction: what transformers takes where the fraction is absent.
        alibi: flag that replaces rotary by ALiBi; None for families without it.
    """

    base: str = "rope_theta"
    fraction: str | None = None
    default_fraction: float = 1.0
    alibi: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        optional = [key for key in (self.fraction, self.alibi) if key is not None]
        spellings = ("rope_parameters", "rope_scaling", "original_max_position_embeddings")
        return ("max_position_embeddings", *spellings, self.base, *optional)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `positions` and `n_ctx`."""
        n_ctx = reader.get("max_position_embeddings", int, 2048)
        flat_base = reader.get(self.base, float, _DEFAULT_BASE)
        flat_fraction = self.default_fraction
        if self.fraction is not None:
            flat_fraction = reader.get(self.fraction, float, self.default_fraction)
        flat_original = reader.get("original_max_position_embeddings", int, None)
        both_spellings = ("rope_scaling", "rope_parameters")
        spelling = next((key for key in both_spellings if reader.get(key, dict, {})), "rope_parameters")
        reader.used.update(both_spellings)
        if self.alibi is not None and reader.get(self.alibi, bool, False):
            # What transformers computes: slopes and products in bfloat16, scaled together with the scores.
            return {"n_ctx": n_ctx, "positions": AlibiPositions(scaled=True, bfloat16=True)}

        rope = reader.nested(spelling)
        base = rope.get("rope_theta", float, flat_base)
        fraction = rope.get("partial_rotary_factor", float, flat_fraction)
        if self.fraction is None and fraction != 1.0:
            rope.reject("partial_rotary_factor", "1.0, since this family rotates whole heads")
        scaling, n_ctx = _read_scaling(rope, n_ctx=n_ctx, flat_original=flat_original)
        if reader.problems:
            return {}
        d_head = fields.get("d_head") or fields["d_model"] // max(fields["n_heads"], 1)
        dim = int(d_head * fraction)
        return {"n_ctx": n_ctx, "positions": RotaryPositions(dim=dim, base=base, scaling=scaling)}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the transformers 5 spelling."""
        positions, n_ctx = fields["positions"], fields["n_ctx"]
        alibi = {} if self.alibi is None else {self.alibi: isinstance(positions, AlibiPositions)}
        if not isinstance(positions, RotaryPositions):
            return {"max_position_embeddings": n_ctx, **alibi}
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": positions.base}
        if self.fraction is not None:
            rope["partial_rotary_factor"] = _fraction_of(positions.dim, fields["d_head"])
        if positions.scaling is not None:
            rope |= _write_scaling(positions.scaling)
            if positions.scaling.kind == "dynamic":
                n_ctx = positions.scaling.original_n_ctx
        return {"max_position_embeddings": n_ctx, "rope_parameters": rope, **alibi}


def _read_scaling(rope: ConfigReader, *, n_ctx: int, flat_original: int | None) -> tuple[RotaryScaling | None, int]:
    """The scaling that the rope object describes, and the context length it gives."""
    rope.used.update({"finetuned", "type"})
    kind = rope.get("rope_type", str, None) or rope.get("type", str, "default")
    if kind not in _KINDS:
        name = "rope_type" if rope.has("rope_type") else "type"
        rope.reject(name, f"one of {', '.join(map(repr, _KINDS))}")
        return None, n_ctx
    nested_original = rope.get("original_max_position_embeddings", int, n_ctx)
    if kind == "default":
        rope.used.add("factor")
        return None, n_ctx
    original = flat_original or nested_original or n_ctx
    factor = rope.get("factor", float, n_ctx / original if kind == "yarn" else REQUIRED)
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=factor), n_ctx
    if kind == "dynamic":
        # Frequencies begin to move past max_position_embeddings, whatever the object says of an original length.
        return RotaryScaling(kind="dynamic", factor=factor, original_n_ctx=n_ctx), int(factor * n_ctx)
    if kind == "llama3":
        low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
        scaling = RotaryScaling(
            kind="llama3", factor=factor, original_n_ctx=original, low_freq_factor=low, high_freq_factor=high
        )
        return scaling, n_ctx
    # transformers takes a zero or null beta as absent, and HookedConfig's own defaults are the paper's, as there.
    numbers = {name: rope.get(name, float, None) for name in _YARN_NUMBERS}
    given = {name: value for name, value in numbers.items() if value or (value is not None and "beta" not in name)}
    truncate = rope.get("truncate", bool, True)
    return RotaryScaling(kind="yarn", factor=factor, original_n_ctx=original, truncate=truncate, **given), n_ctx


def _write_scaling(scaling: RotaryScaling) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_n_ctx
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        numbers = {name: getattr(scaling, name) for name in _YARN_NUMBERS}
        written |= {name: value for name, value in numbers.items() if value is not None}
        written["truncate"] = scaling.truncate
    return written


def _fraction_of(dim: int, d_head: int) -> float:
    """The fraction of a head for which `int(d_head * fraction)` is `dim` again."""
    fraction = dim / d_head
    return fraction if int(d_head * fraction) == dim else math.nextafter(fraction, math.inf)
