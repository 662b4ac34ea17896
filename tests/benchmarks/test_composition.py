"""All composition scores of a model with 12 layers, 12 heads and d_model 768, on two threads."""

import time
from typing import Any

import torch

from hooklens.weights.composition import all_composition_scores
from tests.benchmarks.peak import PeakMemory


def test_all_composition_scores(record: Any) -> None:
    """TransformerLens' dense products take d_model x d_model matrices for every pair of heads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        W_Q, W_K, W_V = (torch.randn(12, 12, 768, 64) for _ in range(3))
        W_O = torch.randn(12, 12, 64, 768)
        with PeakMemory() as memory:
            all_composition_scores(W_Q, W_K, W_V, W_O, "Q")
        seconds = []
        for mode in ("Q", "K", "V"):
            start = time.perf_counter()
            all_composition_scores(W_Q, W_K, W_V, W_O, mode)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    record("all composition scores, 12 layers x 12 heads, slowest mode, s", max(seconds), at_most=3.0)
    record("all composition scores, added memory, GB", memory.peak / 1e9, at_most=1.0)
