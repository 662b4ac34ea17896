"""Rotary frequencies and ALiBi slopes from their published definitions, one number after another."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import AlibiPositions, QueryTemperature, RotaryPositions, RotaryScaling, SinusoidalPositions
from hooklens.verification.explicit.batch import Batch

Table = Float[Tensor, "batch pos pair"]


def rotary_table(
    positions: RotaryPositions, batch: Batch, dtype: torch.dtype, table_dtype: torch.dtype = torch.float32
) -> tuple[Table, Table]:
    """Cosine and sine of the angle by which each pair of entries turns, in float64.

    Angles, cosines and sines are made in `table_dtype`, float32 as checkpoints were trained with, and then rounded to
    the activations' dtype.
    """
    cosines, sines = [], []
    direction = -1.0 if positions.reverse else 1.0
    for row, length in zip(batch.positions().tolist(), _lengths(batch), strict=True):
        frequencies = [_frequency(positions, pair, length) for pair in range(positions.dim // 2)]
        wide = direction * torch.tensor(frequencies, dtype=torch.float64).to(table_dtype)
        angles = torch.tensor(row, dtype=table_dtype)[:, None] * wide[None, :]
        cosines.append(angles.cos() * _amplitude(positions.scaling))
        sines.append(angles.sin() * _amplitude(positions.scaling))
    device = batch.tokens.device
    cos, sin = (torch.stack(rows).to(dtype).to(device, torch.float64) for rows in (cosines, sines))
    return cos, sin


def sinusoidal_table(
    positions: SinusoidalPositions, batch: Batch, d_model: int, table_dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch pos d_model"]:
    """Sine and cosine of each position's angle in each pair of entries; angles are made in `table_dtype`."""
    n_pairs = d_model // 2
    steps = n_pairs - 1 if positions.includes_base else n_pairs
    frequencies = torch.tensor([positions.base ** (-pair / steps) for pair in range(n_pairs)], dtype=torch.float64)
    angles = (batch.positions().cpu() + positions.offset).to(table_dtype)[..., None] * frequencies.to(table_dtype)
    table = torch.empty(*angles.shape[:2], d_model, dtype=torch.float64)
    if positions.layout == "half":
        table[..., :n_pairs], table[..., n_pairs:] = angles.sin(), angles.cos()
    else:
        table[..., 0::2], table[..., 1::2] = angles.sin(), angles.cos()
    return table.to(batch.tokens.device)


def query_temperature(kind: QueryTemperature, batch: Batch, dtype: torch.dtype) -> Float[Tensor, "batch pos"]:
    """The factor on the query at each position, rounded to the activations' dtype."""
    rows = [
        [1 + kind.scale * math.log(1 + (position + kind.offset) // kind.length) for position in row]
        for row in batch.positions().tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64, device=batch.tokens.device).to(dtype).double()


def rotate(
    heads: Float[Tensor, "batch pos head d_head"], positions: RotaryPositions, table: tuple[Table, Table]
) -> Float[Tensor, "batch pos head d_head"]:
    """Each pair of the first `dim` entries as a complex number, times `cos + i sin` of its angle."""
    turn = torch.complex(*table)[:, :, None]
    turning, still = heads[..., : positions.dim], heads[..., positions.dim :]
    half = positions.dim // 2
    if positions.layout == "half":
        turned = torch.complex(turning[..., :half], turning[..., half:]) * turn
        return torch.cat([turned.real, turned.imag, still], -1)
    turned = torch.complex(turning[..., 0::2], turning[..., 1::2]) * turn
    return torch.cat([torch.view_as_real(turned).flatten(-2), still], -1)


def alibi_term(
    alibi: AlibiPositions, n_heads: int, batch: Batch, score_scale: float, dtype: torch.dtype
) -> Float[Tensor, "batch head key"]:
    """What each head adds to its scores at each key: its slope times the key's position (Press et al. 2022)."""
    slopes = torch.tensor(_slopes(n_heads), dtype=torch.float32, device=batch.tokens.device)
    positions = batch.positions()[:, None, :]
    if alibi.bfloat16:
        term = (slopes.bfloat16()[None, :, None] * positions.bfloat16()).double()
    else:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        term = (slopes.to(wide)[None, :, None] * positions.to(wide)).double()
    return term * score_scale if alibi.scaled else term


def _slopes(n_heads: int) -> list[float]:
    """For n a power of 2: 2^(-8/n), 2^(-16/n), ...; else those of the power below, then every other one of 2n."""
    power = 1
    while 2 * power <= n_heads:
        power *= 2
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    finer = [2.0 ** (-8.0 * head / (2 * power)) for head in range(1, 2 * power + 1, 2)]
    return slopes + finer[: n_heads - power]


def _lengths(batch: Batch) -> list[int]:
    if batch.given_positions is None:
        return batch.lengths()
    return [int(batch.given_positions.max()) + 1] * len(batch.tokens)


def _frequency(positions: RotaryPositions, pair: int, length: int) -> float:
    """The angle per position of an entry pair, `base ** (-2 pair / dim)` where nothing stretches it."""
    base, dim, scaling = positions.base, positions.dim, positions.scaling
    plain = float(base ** (-2.0 * pair / dim))
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    assert scaling.original_n_ctx is not None
    if scaling.kind == "dynamic":
        # NTK-aware scaling: the base grows with a sequence that is longer than the original context.
        longest = max(length, scaling.original_n_ctx)
        stretch = scaling.factor * longest / scaling.original_n_ctx - (scaling.factor - 1)
        return float((base * stretch ** (dim / (dim - 2))) ** (-2.0 * pair / dim))
    if scaling.kind == "longrope":
        factors = scaling.long_factors if length > scaling.original_n_ctx else scaling.short_factors
        assert factors is not None
        return plain / factors[pair]
    if scaling.kind == "llama3":
        return _llama3_frequency(plain, scaling)
    return _yarn_frequency(positions, scaling, pair, plain)


def _llama3_frequency(plain: float, scaling: RotaryScaling) -> float:
    """Llama 3.1: waves longer than n/low are stretched, those shorter than n/high kept, those between mixed."""
    n, low, high = scaling.original_n_ctx, scaling.low_freq_factor, scaling.high_freq_factor
    assert n is not None
    assert low is not None
    assert high is not None
    wavelength = 2 * math.pi / plain
    if wavelength < n / high:
        return plain
    if wavelength > n / low:
        return plain / scaling.factor
    smooth = (n / wavelength - low) / (high - low)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn_frequency(positions: RotaryPositions, scaling: RotaryScaling, pair: int, plain: float) -> float:
    """YaRN (Peng et al. 2023), eq. 23: by how often the pair turns within the original context."""
    assert scaling.original_n_ctx is not None
    ends = []
    for turns in (scaling.beta_fast, scaling.beta_slow):
        times = scaling.original_n_ctx / (turns * 2 * math.pi)
        ends.append(positions.dim * math.log(times) / (2 * math.log(positions.base)))
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    low, high = max(low, 0), min(high, positions.dim - 1)
    if low == high:
        high += 0.001
    stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
    return stretched * plain / scaling.factor + (1 - stretched) * plain


def _amplitude(scaling: RotaryScaling | None) -> float:
    """The factor on cosines and sines of YaRN and LongRoPE."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "longrope":
        assert scaling.original_n_ctx is not None
        grown_by = max(scaling.factor, 1.0)
        return math.sqrt(1 + math.log(grown_by) / math.log(scaling.original_n_ctx))
    scales = [scaling.mscale, scaling.mscale_all_dim] if scaling.mscale and scaling.mscale_all_dim else [1.0]
    grown = [1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0 for scale in scales if scale]
    return grown[0] if len(grown) == 1 else grown[0] / grown[1]
