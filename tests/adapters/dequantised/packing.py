"""Weights quantised and packed, and what they are by the published definitions, entry by entry."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from hooklens.adapters.conversion import MemoryTensors
from hooklens.adapters.dequantised.tensors import DequantisedTensors, QuantFormat

Rows = list[list[int]]


def open_tensors(state: dict[str, Tensor], scheme: QuantFormat, *, conv1d: bool = False) -> DequantisedTensors:
    """The tensors of a state dict, dequantised."""
    return DequantisedTensors(MemoryTensors(state), scheme, where="here", conv1d=conv1d, head="head.weight")


def random_rows(n_rows: int, n_columns: int, bits: int, seed: int) -> Rows:
    """Numbers of so many bits; the largest and the least are among them."""
    generator = random.Random(seed)
    rows = [[generator.randrange(2**bits) for _ in range(n_columns)] for _ in range(n_rows)]
    rows[0][0], rows[-1][-1] = 0, 2**bits - 1
    return rows


def pack_words(numbers: Sequence[int], bits: int) -> int:
    """Numbers in an int32, the first in the lowest bits."""
    word = sum(number << (bits * place) for place, number in enumerate(numbers))
    return word - 2**32 if word >= 2**31 else word


def pack_rows(rows: Rows, bits: int) -> Tensor:
    """Each row packed along itself, the last word filled up with zeros."""
    k = 32 // bits
    filled = [row + [0] * (-len(row) % k) for row in rows]
    return torch.tensor([[pack_words(row[i : i + k], bits) for i in range(0, len(row), k)] for row in filled]).int()


def transpose(rows: Rows) -> Rows:
    """Columns as rows."""
    return [list(column) for column in zip(*rows, strict=True)]


def gptq_state(
    name: str, d_in: int, d_out: int, *, bits: int, group_size: int, seed: int = 0, less_one: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """A GPTQ weight with inputs in any order of groups, and what it is, in float64, `[out, in]`."""
    n_groups = math.ceil(d_in / group_size)
    numbers, zeros = random_rows(d_in, d_out, bits, seed), random_rows(n_groups, d_out, bits, seed + 1)
    scales = (torch.rand(n_groups, d_out, generator=torch.Generator().manual_seed(seed)) / 8).half()
    groups = [i // group_size for i in range(d_in)]
    random.Random(seed).shuffle(groups)
    shift = 1 if less_one else 0
    stored_zeros = [[(zero - shift) % 2**bits for zero in row] for row in zeros]
    weight = torch.tensor(
        [
            [float(scales[groups[i], o]) * (numbers[i][o] - zeros[groups[i]][o]) for i in range(d_in)]
            for o in range(d_out)
        ],
        dtype=torch.float64,
    )
    state = {
        f"{name}.qweight": pack_rows(transpose(numbers), bits).T.contiguous(),
        f"{name}.qzeros": pack_rows(stored_zeros, bits),
        f"{name}.scales": scales,
        f"{name}.g_idx": torch.tensor(groups).int(),
    }
    return state, weight


def awq_state(name: str, d_in: int, d_out: int, *, group_size: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """An AWQ weight in AutoAWQ's `GEMM` layout, and what it is, in float64, `[out, in]`."""
    n_groups = d_in // group_size
    numbers, zeros = random_rows(d_in, d_out, 4, seed), random_rows(n_groups, d_out, 4, seed + 1)
    scales = (torch.rand(n_groups, d_out, generator=torch.Generator().manual_seed(seed)) / 8).half()

    def interleave(row: list[int]) -> list[int]:
        # The i-th four bits of a word hold the column of this number (AutoAWQ's `gemm_pack`).
        return [row[word + place] for word in range(0, len(row), 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]

    weight = torch.tensor(
        [
            [float(scales[i // group_size, o]) * (numbers[i][o] - zeros[i // group_size][o]) for i in range(d_in)]
            for o in range(d_out)
        ],
        dtype=torch.float64,
    )
    state = {
        f"{name}.qweight": pack_rows([interleave(row) for row in numbers], 4),
        f"{name}.qzeros": pack_rows([interleave(row) for row in zeros], 4),
        f"{name}.scales": scales,
    }
    return state, weight


def scaled_state(
    name: str, weight: Tensor, *, scale: str, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight in blocks with a scale each, the last ones cut off, and what it is, in float64."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    rows, columns = weight.shape
    grid = torch.zeros(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    entries, exact = torch.zeros(rows, columns), torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            grid[i, j] = weight[place].abs().max() / largest
            entries[place] = (weight[place] / grid[i, j]).clamp(-largest, largest)
    stored = entries.round().to(dtype) if dtype == torch.int8 else entries.to(dtype)
    for i in range(rows):
        for j in range(columns):
            exact[i, j] = float(stored[i, j]) * float(grid[i // block[0], j // block[1]])
    return {f"{name}.weight": stored, f"{name}.{scale}": grid}, exact


def compressed_state(
    name: str, d_in: int, d_out: int, *, bits: int, group_size: int, zeros: bool, shuffled: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight in compressed-tensors' `pack-quantized` layout, and what it is, in float64, `[out, in]`."""
    n_groups = math.ceil(d_in / group_size)
    numbers, points = random_rows(d_out, d_in, bits, seed), random_rows(d_out, n_groups, bits, seed + 1)
    if not zeros:
        points = [[2 ** (bits - 1)] * n_groups for _ in range(d_out)]
    scales = (torch.rand(d_out, n_groups, generator=torch.Generator().manual_seed(seed)) / 8).bfloat16()
    groups = [i // group_size for i in range(d_in)]
    if shuffled:
        random.Random(seed).shuffle(groups)
    weight = torch.tensor(
        [
            [float(scales[o, groups[i]]) * (numbers[o][i] - points[o][groups[i]]) for i in range(d_in)]
            for o in range(d_out)
        ],
        dtype=torch.float64,
    )
    state = {
        f"{name}.weight_packed": pack_rows(numbers, bits),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor([d_out, d_in]),
    }
    if zeros:
        state[f"{name}.weight_zero_point"] = pack_rows(transpose(points), bits).T.contiguous()
    if shuffled:
        state[f"{name}.weight_g_idx"] = torch.tensor(groups).int()
    return state, weight
