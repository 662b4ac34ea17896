"""Rotary position embedding (Su et al. 2021, "RoFormer") and the ways its frequencies are stretched.

An entry pair (a, b) of a query or key at position t turns by the angle `t * frequency`:
`(a cos - b sin, b cos + a sin)`, or by minus that angle. Tables are made in float32, as checkpoints were trained
with, and cast to the activations' dtype.
"""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import CacheError
from hooklens.model.plan.positions import TokenPlan

CosSin = tuple[Float[Tensor, "rows pos one turning"], Float[Tensor, "rows pos one turning"]]


@cache
def rotary_tables(positions: RotaryPositions, d_head: int) -> "RotaryTables":
    """The tables of some rotary parameters: one for all layers, and networks, that have the same."""
    return RotaryTables(positions, d_head)


class RotaryTables:
    """Cosines and signed sines for the positions of a call, kept and grown between calls.

    Args:
        positions: which entries of a head turn, and how fast.
        d_head: width of a head; entries past `positions.dim` do not turn.
    """

    def __init__(self, positions: RotaryPositions, d_head: int) -> None:
        self.positions = positions
        self.d_head = d_head
        self._tables: dict[tuple[torch.device, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def look_up(self, plan: TokenPlan, dtype: torch.dtype) -> CosSin:
        """Cosines and sines for the columns of a call, in the activations' dtype; looked up once per call.

        Raises:
            CacheError: frequencies depend on the sequence's length, and keys that were turned by those of a
                shorter one lie in the cache.
        """
        return plan.remember((self, dtype), self._look_up, plan, dtype)

    def _look_up(self, plan: TokenPlan, dtype: torch.dtype) -> CosSin:
        n_positions = plan.n_positions
        if self.depends_on_length(n_positions) and self.depends_on_length(plan.longest):
            return self._look_up_by_length(plan, n_positions, dtype)
        cos, sin = self._table(n_positions, plan.device, dtype)
        if plan.is_contiguous:
            columns = slice(plan.n_past, n_positions)
            return cos[None, columns, None], sin[None, columns, None]
        positions = plan.positions
        return cos[positions][:, :, None], sin[positions][:, :, None]

    def _look_up_by_length(self, plan: TokenPlan, n_positions: int, dtype: torch.dtype) -> CosSin:
        """Tables for each row's own length, so that padding changes nothing."""
        scaling = self.positions.scaling
        assert scaling is not None
        if plan.n_past and not self._has_long_past(plan):
            raise CacheError(
                f"rotary scaling {scaling.kind!r}: past {scaling.original_n_ctx} tokens the frequencies depend on the "
                f"sequence's length, so the {plan.n_past} cached keys do not fit a sequence of {n_positions}; "
                "run the whole sequence without a cache"
            )
        if plan.counts_within_documents:
            return self._look_up_by_document(plan, n_positions, dtype)
        lengths = plan.n_tokens.tolist() if plan.key_mask is not None else [n_positions]
        positions = plan.positions.expand(len(lengths), -1)
        rows = [
            [table[position] for table in self._table_of_length(n_positions, length, plan.device, dtype)]
            for position, length in zip(positions, lengths, strict=True)
        ]
        cos, sin = (torch.stack(tables) for tables in zip(*rows, strict=True))
        return cos[:, :, None], sin[:, :, None]

    def fits_past(self, plan: TokenPlan) -> bool:
        """Whether the cached keys of a call, if any, turned at the frequencies of its sequences' lengths."""
        depends = self.depends_on_length(plan.n_positions) and self.depends_on_length(plan.longest)
        return not plan.n_past or not depends or self._has_long_past(plan)

    def _has_long_past(self, plan: TokenPlan) -> bool:
        """Whether cached keys turned at the frequencies of this length already (longrope: those of all long ones)."""
        scaling = self.positions.scaling
        assert scaling is not None
        if scaling.kind != "longrope" or plan.given_positions is not None or plan.counts_within_documents:
            return False
        n_past = [plan.n_past] if plan.past_mask is None else plan.past_mask.sum(1).tolist()
        n_all = plan.n_tokens.tolist() if plan.key_mask is not None else [plan.n_keys]
        if len(n_past) < len(n_all):
            n_past = n_past * len(n_all)
        # A row whose past is empty has nothing cached that could fit or not.
        return all(
            not past or self.depends_on_length(past) == self.depends_on_length(whole)
            for past, whole in zip(n_past, n_all, strict=False)
        )

    def _look_up_by_document(self, plan: TokenPlan, n_positions: int, dtype: torch.dtype) -> CosSin:
        """The same for each document's own length."""
        lengths, positions = plan.document_lengths, plan.positions
        cos, sin = (table[positions] for table in self._table(n_positions, plan.device, dtype))
        for length in sorted(set(lengths.flatten().tolist())):
            if self.depends_on_length(length):
                own = (lengths == length)[:, :, None]
                tables = self._table_of_length(n_positions, length, plan.device, dtype)
                cos, sin = (
                    torch.where(own, own_table[positions], kept)
                    for own_table, kept in zip(tables, (cos, sin), strict=True)
                )
        return cos[:, :, None], sin[:, :, None]

    def _table_of_length(
        self, n_positions: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The table of sequences of a length; kept where it is that of all such long ones."""
        scaling = self.positions.scaling
        if scaling is not None and scaling.kind == "longrope":
            return self._table(n_positions, device, dtype, is_long=self.depends_on_length(length))
        return self._make_table(n_positions, length, device, dtype)

    def _table(
        self, n_positions: int, device: torch.device, dtype: torch.dtype, *, is_long: bool = False
    ) -> tuple[Tensor, Tensor]:
        n_tokens = _original_n_ctx(self.positions) + 1 if is_long else None
        if torch.compiler.is_compiling():
            return self._compute_table(n_positions, n_tokens, device, dtype)
        table = self._tables.get((device, dtype, is_long))
        if table is None or len(table[0]) < n_positions:
            grown = max(n_positions, 64 if table is None else 2 * len(table[0]))
            table = self._make_table(grown, n_tokens, device, dtype)
            self._tables[device, dtype, is_long] = table
        return table

    def depends_on_length(self, n_positions: int) -> bool:
        """Whether a sequence of this length turns at other frequencies than short ones (dynamic scaling, longrope)."""
        scaling = self.positions.scaling
        return (
            scaling is not None
            and (scaling.kind == "dynamic" or scaling.short_factors != scaling.long_factors)
            and scaling.original_n_ctx is not None
            and n_positions > scaling.original_n_ctx
        )

    @torch.no_grad()
    def _make_table(
        self, n_positions: int, n_tokens: int | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(mode=False):
            return self._compute_table(n_positions, n_tokens, device, dtype)

    def _compute_table(
        self, n_positions: int, n_tokens: int | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        frequencies, amplitude = rotary_frequencies(self.positions, n_tokens, device=device)
        angles = torch.arange(n_positions, device=device).float()[:, None] * frequencies[None]
        cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
        if self.positions.reverse:
            sin = -sin
        if self.positions.layout == "half":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        else:
            cos = cos.repeat_interleave(2, -1)
            sin = torch.stack([-sin, sin], -1).flatten(-2)
        return cos.to(dtype), sin.to(dtype)

    def waves(
        self, n_positions: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "pos dim"], Float[Tensor, "pos dim"]]:
        """The cosine and the sine of each entry's angle at each position, from 0 on."""
        cos, signed = self._compute_table(n_positions, None, device, dtype)
        firsts = slice(self.positions.dim // 2) if self.positions.layout == "half" else slice(None, None, 2)
        sin = signed.clone()
        sin[:, firsts] = -sin[:, firsts]
        return cos, sin

    def rotate(
        self, heads: Float[Tensor, "batch pos heads d_head"], table: CosSin
    ) -> Float[Tensor, "batch pos heads d_head"]:
        """Turn queries or keys by the angles of their positions."""
        if self.positions.dim == self.d_head:
            return self._turn(heads, table)
        # The function behind torch.split, which takes its time.
        turning, still = torch.split_with_sizes(heads, [self.positions.dim, self.d_head - self.positions.dim], -1)
        return torch.cat((self._turn(turning, table), still), -1)

    def _turn(self, heads: Tensor, table: CosSin) -> Tensor:
        cos, signed_sin = table
        if self.positions.layout == "half":
            swapped = heads.roll(self.positions.dim // 2, -1)
        else:
            swapped = heads.reshape(*heads.shape[:-1], -1, 2).flip(-1).flatten(-2)
        turned = torch.addcmul(heads * cos, swapped, signed_sin)
        # Under autocast the tables are finer than the heads.
        return turned if turned.dtype is heads.dtype else turned.to(heads.dtype)


def _original_n_ctx(positions: RotaryPositions) -> int:
    """The length up to which frequencies are those of short sequences."""
    assert positions.scaling is not None
    assert positions.scaling.original_n_ctx is not None
    return positions.scaling.original_n_ctx


def rotary_frequencies(
    positions: RotaryPositions, n_tokens: int | None = None, *, device: torch.device | None = None
) -> tuple[Float[Tensor, " half"], float]:
    """The angle per position of each entry pair, and a factor on cosines and sines.

    Args:
        positions: the rotary parameters.
        n_tokens: length of the sequence, which only dynamic scaling and longrope look at.
        device: where to make them.
    """
    exponents = torch.arange(0, positions.dim, 2, dtype=torch.int64, device=device).float() / positions.dim
    plain = 1.0 / (positions.base**exponents)
    scaling = positions.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(plain, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn_frequencies(positions, scaling, exponents), _yarn_amplitude(scaling)
    if scaling.kind == "longrope":
        return _longrope_frequencies(positions, scaling, exponents, n_tokens), _longrope_amplitude(scaling)
    return _dynamic_frequencies(positions, scaling, exponents, n_tokens), 1.0


def _dynamic_frequencies(
    positions: RotaryPositions, scaling: RotaryScaling, exponents: Tensor, n_tokens: int | None
) -> Tensor:
    """NTK-aware scaling: past the original length the base grows with the sequence."""
    assert scaling.original_n_ctx is not None
    length = max(n_tokens or 0, scaling.original_n_ctx)
    stretch = scaling.factor * length / scaling.original_n_ctx - (scaling.factor - 1)
    base = positions.base * stretch ** (positions.dim / (positions.dim - 2))
    frequencies: Tensor = 1.0 / (base**exponents)
    return frequencies


def _longrope_frequencies(
    positions: RotaryPositions, scaling: RotaryScaling, exponents: Tensor, n_tokens: int | None
) -> Tensor:
    """LongRoPE (Ding et al. 2024): a factor searched for each frequency, one set for lengths past the original."""
    assert scaling.original_n_ctx is not None
    is_long = n_tokens is not None and n_tokens > scaling.original_n_ctx
    factors = scaling.long_factors if is_long else scaling.short_factors
    stretch = torch.tensor(factors, dtype=torch.float32, device=exponents.device)
    frequencies: Tensor = 1.0 / (stretch * positions.base**exponents)
    return frequencies


def _longrope_amplitude(scaling: RotaryScaling) -> float:
    assert scaling.original_n_ctx is not None
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_n_ctx))


def _llama3_frequencies(plain: Tensor, scaling: RotaryScaling) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between mixed."""
    assert scaling.original_n_ctx is not None
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    turns = scaling.original_n_ctx / (2 * math.pi / plain)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn_frequencies(positions: RotaryPositions, scaling: RotaryScaling, exponents: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023): stretch by how often an entry pair turns within the original length."""
    assert scaling.original_n_ctx is not None
    length, dim = scaling.original_n_ctx, positions.dim

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(positions.base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=exponents.device) - first) / width).clamp(0, 1)
    wave = positions.base**exponents
    return ramp / (scaling.factor * wave) + (1 - ramp) / wave


def _yarn_amplitude(scaling: RotaryScaling) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
