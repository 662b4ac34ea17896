"""A network with weights set by hand, which answers a prompt `[x, y]` with the token of the pair `(x, y)`.

Layer 0 copies `x` to the last position, into a subspace of its own; layer 1 does nothing. So between the two the last
position holds both variables, in orthogonal subspaces of three dimensions, turned by a random rotation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.alignment import CausalModel
from hooklens.config import HookedConfig, LearnedPositions

N = 3
D_MODEL = 12


class PairModel(NamedTuple):
    model: HookedCausalLM
    causal_model: CausalModel
    prompts: Tensor
    first: Tensor
    """`[3 d_model]`, the directions of `x` at the last position."""
    second: Tensor


def make_pair_model(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PairModel:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q.T
    first, second, own, position = rotation.split([N, N, N, N])
    d_vocab = 2 * N + N * N
    W_E = torch.zeros(d_vocab, D_MODEL, dtype=torch.float64)
    W_E[:N], W_E[N : 2 * N] = own, second
    W_U = torch.zeros(D_MODEL, d_vocab, dtype=torch.float64)
    for x in range(N):
        for y in range(N):
            W_U[:, 2 * N + N * x + y] = 6 * (first[x] + second[y])
    W_pos = position[:2]
    zeros = torch.zeros(1, D_MODEL, 4, dtype=torch.float64)
    W_Q, W_K, W_V, W_O = zeros.clone(), zeros.clone(), zeros.clone(), zeros.mT.clone()
    # The last position looks for the first one.
    W_Q[0, :, 0], W_K[0, :, 0] = 20 * position[1], position[0]
    W_V[0, :, 1:], W_O[0, 1:] = own.T, first
    weights = {"embed.W_E": W_E, "pos_embed.W_pos": W_pos, "unembed.W_U": W_U}
    for layer in range(2):
        names = ("W_Q", "W_K", "W_V", "W_O")
        weights |= {
            f"blocks.{layer}.attn.{name}": one * (layer == 0)
            for name, one in zip(names, (W_Q, W_K, W_V, W_O), strict=True)
        }
    cfg = HookedConfig(
        d_model=D_MODEL, n_layers=2, n_heads=1, d_head=4, d_vocab=d_vocab, n_ctx=2, attn_only=True, attn_scale=1.0,
        norm=None, final_norm=None, positions=LearnedPositions(), qkv_bias=False, out_bias=False,
    )  # fmt: skip
    model = HookedCausalLM.from_state_dict({name: one.contiguous() for name, one in weights.items()}, cfg)
    causal_model = CausalModel(
        {"first": lambda tokens: tokens[:, 0], "second": lambda tokens: tokens[:, 1] - N},
        lambda first, second: 2 * N + N * first + second,
    )
    prompts = torch.cartesian_prod(torch.arange(N), N + torch.arange(N))
    return PairModel(model.to(dtype).eval(), causal_model, prompts, first, second)
