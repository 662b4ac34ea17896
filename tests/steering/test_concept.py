"""The closed form of LEACE against the formula written out, and what a probe finds behind it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize

from hooklens.steering.concept import ConceptMoments


def draw(seed, n, d, classes, *, rank=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = 2 * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = means[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + 5
    if rank is not None:
        x = (
            x
            @ torch.randn(d, rank, generator=generator, dtype=torch.float64)
            @ torch.randn(rank, d, generator=generator, dtype=torch.float64)
        )
    return x, labels


def apply(eraser, x):
    return x - (x - eraser.mean) @ eraser.readers.T @ eraser.writers


def leace_by_formula(x, labels, classes):
    """Theorem 4.3 in numpy and scipy, with a full one-hot concept: P = I - W^+ P_{W S_xz} W."""
    x, z = x.numpy(), np.eye(classes)[labels.numpy()]
    away, concept = x - x.mean(0), z - z.mean(0)
    covariance, crossed = away.T @ away / len(x), away.T @ concept / len(x)
    W = linalg.pinvh(linalg.sqrtm(covariance).real, rtol=1e-7)
    whitened = W @ crossed
    # The last singular value is zero but for rounding: entries of a one-hot vector sum to one.
    onto = whitened @ np.linalg.pinv(whitened, rcond=1e-7)
    P = np.eye(x.shape[1]) - np.linalg.pinv(W, rcond=1e-7) @ onto @ W
    return x.mean(0) + away @ P.T


def probe_gain(x, labels, classes):
    """How far below the loss of the class frequencies a linear probe comes on its own training data, in nats."""
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    features = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    def loss(flat):
        weights = torch.tensor(flat, requires_grad=True)
        value = torch.nn.functional.cross_entropy(features @ weights.view(-1, classes), labels)
        value.backward()
        return value.item(), weights.grad.numpy()

    best = optimize.minimize(loss, np.zeros(features.shape[1] * classes), jac=True, method="L-BFGS-B").fun
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    return float(-(share * share.log()).sum()) - best


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99), classes=st.integers(2, 4), d=st.integers(4, 9),
    method=st.sampled_from(["leace", "mean_difference"]),
    cuts=st.lists(st.integers(1, 89), max_size=3, unique=True), low_rank=st.booleans(),
)  # fmt: skip
def test_batches_probes_and_the_formula(seed, classes, d, method, cuts, low_rank):
    x, labels = draw(seed, 90, d, classes, rank=d - 1 if low_rank else None)
    edges = [0, *sorted(cuts), 90]
    parts = [ConceptMoments.of(x[a:b], labels[a:b], classes) for a, b in itertools.pairwise(edges)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part)
    whole = ConceptMoments.of(x, labels, classes)
    for field in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(joined, field), getattr(whole, field), rtol=1e-9, atol=1e-9)
    eraser = joined.erase(method)
    assert len(eraser.readers) == min(classes - 1, d - 1 if low_rank else d)
    erased = apply(eraser, x)
    means = torch.stack([erased[labels == k].mean(0) for k in range(classes)])
    # The covariance's root and its inverse lose half of float64's digits where it is ill conditioned.
    torch.testing.assert_close(means, x.mean(0).expand_as(means), rtol=1e-6, atol=1e-6)
    moved = float((erased - x).square().sum() / (x - x.mean(0)).square().sum())
    assert eraser.removed == pytest.approx(moved, rel=1e-6)
    if method == "leace":
        torch.testing.assert_close(erased, torch.from_numpy(leace_by_formula(x, labels, classes)), rtol=1e-5, atol=1e-5)
        assert moved <= whole.erase("mean_difference").removed + 1e-9
    else:
        torch.testing.assert_close(eraser.readers @ eraser.writers.T, torch.eye(len(eraser.readers)).double())


@pytest.mark.parametrize("method", ["leace", "mean_difference"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_is_at_chance(method, classes):
    x, labels = draw(7, 200, 6, classes)
    assert probe_gain(x, labels, classes) > 0.3
    erased = apply(ConceptMoments.of(x, labels, classes).erase(method), x)
    # Equal means: the constant probe is the best one, and where the search starts but for rounding.
    assert probe_gain(erased, labels, classes) < 1e-6


def test_classes_without_difference_and_vectors_without_spread():
    x = torch.ones(6, 3, dtype=torch.float64)
    eraser = ConceptMoments.of(x, torch.tensor([0, 1] * 3), 2).erase("leace")
    assert eraser.readers.shape == (0, 3)
    assert eraser.removed == 0.0
