import math

import pytest
import torch

from hooklens.pool.comparing import measures
from hooklens.pool.comparing.measures import linear_cka, mean_cosine, mean_relative_norm


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unbiased_hsic(K, L):
    """Song et al. 2012, equation 5, as it stands there: kernels without their diagonals."""
    n = len(K)
    K, L = K - K.diag().diag(), L - L.diag().diag()
    ones = torch.ones(n, dtype=torch.float64)
    outer = (ones @ K @ ones) * (ones @ L @ ones) / ((n - 1) * (n - 2))
    return ((K @ L).trace() + outer - 2 / (n - 2) * (ones @ K @ L @ ones)) / (n * (n - 3))


def published_hsic(K, L):
    """Gretton et al. 2005: the trace of kernels centred by a matrix."""
    n = len(K)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    return (K @ H @ L @ H).trace() / (n - 1) ** 2


def align(hsic, x, y):
    K, L = x @ x.T, y @ y.T
    return float(hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt())


# Fewer tokens than features, as many, and more: kernels and products of features take turns.
@pytest.mark.parametrize(("n", "left", "right"), [(4, 9, 9), (7, 5, 12), (12, 12, 12), (40, 6, 3), (40, 1, 8)])
@pytest.mark.parametrize("chunk", [10, 2**22])
def test_cka_is_what_was_published(n, left, right, chunk, monkeypatch):
    monkeypatch.setattr(measures, "_CHUNK_ENTRIES", chunk)
    x, y = draw(n, left) + 3, draw(n, right, seed=1) - 2
    y[:, 0] += 2 * x[:, 0]
    # Sums of some hundred float64 products that cancel in part.
    assert linear_cka(x, y, debiased=False) == pytest.approx(align(published_hsic, x, y), rel=1e-10)
    if float(unbiased_hsic(y @ y.T, y @ y.T)) > 0 and float(unbiased_hsic(x @ x.T, x @ x.T)) > 0:
        assert linear_cka(x, y) == pytest.approx(align(unbiased_hsic, x, y), rel=1e-9, abs=1e-12)


def test_cka_does_not_change_with_a_rotation_a_shift_and_a_scale():
    x, y = draw(30, 8), draw(30, 5, seed=1)
    turned = 7 * x @ torch.linalg.qr(draw(8, 8, seed=2)).Q + 1000
    for debiased in (True, False):
        assert linear_cka(x, turned, debiased=debiased) == pytest.approx(1, abs=1e-9)
        same = linear_cka(x, y, debiased=debiased)
        assert linear_cka(turned, y, debiased=debiased) == pytest.approx(same, abs=1e-9)


def test_only_the_debiased_cka_of_unrelated_models_is_near_0_where_tokens_are_few():
    x, y = draw(30, 400), draw(30, 400, seed=1)
    assert linear_cka(x, y, debiased=False) > 0.9
    assert abs(linear_cka(x, y)) < 0.1


def test_cka_of_what_does_not_vary_is_none():
    """The criterion is 0 then, and 0 / 0 raised an error."""
    assert math.isnan(linear_cka(torch.ones(9, 3), draw(9, 3)))
    assert math.isnan(linear_cka(draw(3, 3), draw(3, 3, seed=1)))
    assert linear_cka(draw(3, 3), draw(3, 3), debiased=False) == pytest.approx(1)


@pytest.mark.parametrize("chunk", [10, 2**22])
def test_cosine_and_relative_norm_are_means_over_tokens(chunk, monkeypatch):
    monkeypatch.setattr(measures, "_CHUNK_ENTRIES", chunk)
    x, y = draw(11, 6), draw(11, 6, seed=1)
    cosines = torch.nn.functional.cosine_similarity(x, y)
    norms = torch.stack([(b - a).norm() / a.norm() for a, b in zip(x, y, strict=True)])
    assert mean_cosine(x, y) == pytest.approx(float(cosines.mean()), rel=1e-12)
    assert mean_relative_norm(x, y) == pytest.approx(float(norms.mean()), rel=1e-12)


def test_vectors_that_are_0():
    x = draw(3, 4)
    x[1] = 0
    assert mean_relative_norm(x, x) == 0
    assert mean_relative_norm(x, x + 1) == math.inf
    assert math.isnan(mean_cosine(x, x + 1))


def test_half_precision_is_summed_in_float64():
    """In bfloat16 the norm of a thousand equal numbers is off by a hundredth, and the cosine with it."""
    x = torch.full((2, 1000), 0.1, dtype=torch.bfloat16)
    assert mean_cosine(x, x) == pytest.approx(1, abs=1e-12)
    assert mean_relative_norm(x, 2 * x) == pytest.approx(1, abs=1e-12)
