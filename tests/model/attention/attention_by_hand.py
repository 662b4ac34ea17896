"""Attention one query at a time over the keys it sees and no others, and random inputs to hold every way to it with."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hooklens.model.attention.attend import additive_mask
from hooklens.model.attention.kernels import Part

SCALE = 0.7

DEVICES = [
    ("cpu", torch.float64, 1e-12),
    # float32 sums in another order: a few units in the last place of numbers up to 4.
    ("cpu", torch.float32, 4e-6),
    pytest.param("cuda", torch.float64, 1e-12, marks=pytest.mark.gpu),
    # Products on the tensor cores keep float32's 24 bits only together, in three steps.
    pytest.param("cuda", torch.float32, 2e-5, marks=pytest.mark.gpu),
]


def attend_by_hand(
    q: Tensor,
    parts: list[tuple[Tensor, Tensor, Tensor]],
    *,
    score_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over parts `(k, v, hidden)` and its log-sum, `[batch head query]`; hidden scores are never computed.

    `hidden` is `[batch query key]`; keys and values may have one row for all.
    """
    batch, n_query, n_heads, _ = q.shape
    rows = []
    for row in range(batch):
        for i in range(n_query):
            for head in range(n_heads):
                keys, values = [], []
                for k, v, hidden in parts:
                    seen = ~hidden[row, i]
                    own = row if len(k) > 1 else 0
                    keys.append(k[own, seen, head * k.shape[2] // n_heads])
                    values.append(v[own, seen, head * v.shape[2] // n_heads])
                rows.append(_attend_to(q[row, i, head], torch.cat(keys), torch.cat(values), score_scale, softcap))
    z = torch.stack([z for z, _ in rows]).view(batch, n_query, n_heads, -1)
    log_sum = torch.stack([log_sum for _, log_sum in rows]).view(batch, n_query, n_heads)
    return z, log_sum.transpose(1, 2)


def _attend_to(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    if not len(keys):
        return q.new_zeros(values.shape[-1]), q.new_tensor(-torch.inf)
    scores = keys @ q * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


class Case(NamedTuple):
    """Inputs of every kind: grouped or not, rows that see nothing, parts without keys, one past for all rows."""

    q: Tensor
    parts: list[Part]
    hidden: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, *itertools.chain.from_iterable((part.k, part.v) for part in self.parts)]

    def by_hand(self, softcap: float | None) -> tuple[Tensor, Tensor]:
        parts = [(part.k, part.v, hidden) for part, hidden in zip(self.parts, self.hidden, strict=True)]
        return attend_by_hand(self.q, parts, score_scale=SCALE, softcap=softcap)


@st.composite
def cases(draw, max_parts: int = 2):
    batch, n_query = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kinds = st.sampled_from(["open", "keys", "queries", "causal"])
    parts = draw(
        st.lists(st.tuples(st.integers(0, 5), kinds, st.booleans(), st.booleans()), min_size=1, max_size=max_parts)
    )
    return batch, n_query, n_kv_heads, group, parts, draw(st.integers(0, 999))


def build(case, device="cpu", dtype=torch.float64) -> Case:
    batch, n_query, n_kv_heads, group, parts, seed = case
    generator = torch.Generator().manual_seed(seed)

    def tensor(rows, pos, heads):
        numbers = torch.randn(rows, pos, heads, 8, generator=generator, dtype=torch.float64)
        return numbers.to(device, dtype).requires_grad_()

    def chance(*shape):
        # Most keys are hidden, so that many queries see none.
        return (torch.rand(*shape, generator=generator) < 0.7).to(device)

    built, hidden = [], []
    for n_key, kind, one_row, one_mask in parts:
        rows = 1 if one_row and kind != "causal" else batch
        own_mask = {
            "keys": (1 if one_mask else batch, 1, 1, n_key),
            "queries": (1 if one_mask else batch, 1, n_query, n_key),
        }
        mask = None
        if kind in own_mask:
            covered = chance(*own_mask[kind])
            mask = additive_mask(covered, dtype)
        elif kind == "causal":
            covered = torch.ones(n_query, n_key, dtype=torch.bool, device=device).triu(1)[None, None]
        else:
            covered = torch.zeros(1, 1, 1, n_key, dtype=torch.bool, device=device)
        built.append(Part(tensor(rows, n_key, n_kv_heads), tensor(rows, n_key, n_kv_heads), mask, kind == "causal"))
        hidden.append(covered[:, 0].expand(batch, n_query, n_key))
    return Case(tensor(batch, n_query, n_kv_heads * group), built, hidden)
