"""Bases of subspaces, by hand and from activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import edits
from hooklens.alignment import AlignmentError, Basis
from hooklens.errors import CheckpointError
from tests.annotations import unchecked

NAME = "blocks.0.hook_resid_pre"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(rows):
    """Onto the span of any rows."""
    return torch.linalg.pinv(rows) @ rows


@given(k=st.integers(1, 5), doubled=st.booleans(), seed=st.integers(0, 30))
@settings(max_examples=20)
def test_a_basis_of_a_span_spans_it(k, doubled, seed):
    directions = draw(k, 7, seed=seed) * 100
    basis = Basis.of_span(NAME, torch.cat([directions, directions.flip(0)]) if doubled else directions)
    assert basis.rows.shape == (k, 7)
    # 1e-9: pseudo-inverses of directions that nearly depend on each other lose some digits.
    torch.testing.assert_close(basis.rows.T @ basis.rows, projection(directions), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(basis.rows @ basis.rows.T, torch.eye(k).double(), rtol=1e-12, atol=1e-12)


def test_fewer_dimensions_are_the_leading_ones():
    directions = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    basis = Basis.of_span(NAME, directions, n_dims=2)
    torch.testing.assert_close(basis.rows.abs(), torch.eye(3)[[1, 2]])


def test_a_probes_basis_is_what_tells_its_outputs_apart():
    weight = draw(4, 7)
    shared = draw(7, seed=1)
    one, other = Basis.of_probe(NAME, weight), Basis.of_probe(NAME, weight + 50 * shared)
    assert len(one) == 3
    # 1e-9: the large shared part costs digits.
    torch.testing.assert_close(one.rows.T @ one.rows, other.rows.T @ other.rows, rtol=1e-9, atol=1e-9)
    single = Basis.of_probe(NAME, weight[:1])
    torch.testing.assert_close(single.rows.abs(), (weight[:1] / weight[:1].norm()).abs())


def make_classes(n_values=3, n=300, *, noise=0.01):
    """Activations with a variable in the first three of eight entries, turned, and a large nuisance elsewhere."""
    rotation = torch.linalg.qr(draw(8, 8, seed=5)).Q
    values = torch.arange(n) % n_values
    flat = noise * draw(n, 8, seed=6)
    flat[torch.arange(n), values] += 1.0
    flat[:, 5:] += 3 * draw(n, 3, seed=7)
    return flat @ rotation, values, rotation


def test_two_values_differ_along_their_difference_of_means():
    activations, values, _ = make_classes(2)
    basis = Basis.of_mean_differences(NAME, activations, values)
    difference = activations[values == 1].mean(0) - activations[values == 0].mean(0)
    torch.testing.assert_close(basis.rows.abs(), (difference / difference.norm())[None].abs())
    assert dict(basis.details) == {"rows": 300, "values": 2}


@pytest.mark.parametrize("make", [Basis.of_mean_differences, Basis.of_fitted_probe])
def test_bases_of_values_span_the_differences_between_codes(make):
    activations, values, rotation = make_classes(3, 3000)
    codes = rotation[:3] - rotation[:3].mean(0)
    truth = Basis.of_span(NAME, codes)
    basis = make(NAME, activations, values)
    assert len(basis) == 2
    # The nuisance of standard deviation 3 moves means of 1000 rows by 0.1, of codes 1.4 apart; a probe whitens it.
    assert basis.overlap(truth) > (0.95 if make == Basis.of_mean_differences else 0.999)


def test_means_count_as_often_as_their_value_occurs():
    activations, values = draw(60, 8), torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    between = torch.zeros(8, 8).double()
    for value in range(3):
        away = activations[values == value].mean(0) - activations.mean(0)
        between += int((values == value).sum()) * away[:, None] * away
    leading = torch.linalg.eigh(between).eigenvectors[:, -1]
    basis = Basis.of_mean_differences(NAME, activations, values, n_dims=1)
    torch.testing.assert_close(basis.rows.T @ basis.rows, leading[:, None] * leading, rtol=1e-9, atol=1e-9)


def test_principal_components_are_those_of_the_covariance():
    activations, _, _ = make_classes()
    basis = Basis.of_principal_components(NAME, activations, n_dims=3)
    leading = torch.linalg.eigh(torch.cov(activations.T)).eigenvectors[:, -3:]
    torch.testing.assert_close(basis.rows.T @ basis.rows, leading @ leading.T, rtol=1e-9, atol=1e-9)


def test_random_directions_are_the_seeds_and_uniform():
    state = torch.get_rng_state()
    one = Basis.random(NAME, 2, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert one == Basis.random(NAME, 2, 10, seed=1)
    assert one != Basis.random(NAME, 2, 10, seed=2)
    truth = Basis(NAME, torch.eye(10)[:4])
    mean = sum(Basis.random(NAME, 2, 10, seed=seed).overlap(truth) for seed in range(400)) / 400
    # A single overlap has a standard deviation of about 0.1, the mean of 400 of 0.006.
    assert abs(mean - 0.4) < 0.03


def test_overlap_goes_from_none_to_all():
    eye = torch.eye(6)
    plane, other = Basis(NAME, eye[:2]), Basis(NAME, eye[2:4])
    assert plane.overlap(other) == 0.0
    assert plane.overlap(Basis(NAME, eye[:5])) == 1.0
    turned = Basis(NAME, ((eye[:2] + eye[2:4]) / 2**0.5))
    # 1e-6: float32.
    assert plane.overlap(turned) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(AlignmentError, match="have 6 and 5 entries"):
        plane.overlap(Basis(NAME, torch.eye(5)))


def test_edits_of_a_basis():
    basis = Basis(NAME, torch.eye(6)[:2])
    source = torch.zeros(3, 6)
    assert basis.interchange(source, pos=-1, rows=[0, 1, 2]) == edits.Interchange(
        NAME, basis.rows, source, pos=-1, rows=[0, 1, 2]
    )
    assert basis.project(keep=True, pos=0) == edits.Project(NAME, basis.rows, keep=True, pos=0)


def test_a_file_holds_all(tmp_path):
    basis = Basis(
        NAME, torch.linalg.qr(draw(6, 2)).Q.T, "by hand", {"paper": "x", "n": 3, "share": 0.5, "on": True, "no": None}
    )
    basis.save(tmp_path / "basis.safetensors")
    assert Basis.load(tmp_path / "basis.safetensors") == basis
    assert repr(basis).startswith("Basis('blocks.0.hook_resid_pre', 2 of 6 directions, 'by hand', paper='x', n=3")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read a basis"):
        Basis.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Basis("", torch.eye(3)), "Basis: name is '', expected a text"),
        (
            lambda: Basis(NAME, torch.eye(3)[:, :2]),
            r"rows are a tensor \[3, 2\] of torch.float32; expected .* k from 1 to d",
        ),
        (lambda: Basis(NAME, torch.eye(3)[:0]), "expected real numbers"),
        (
            lambda: Basis(NAME, 2 * torch.eye(3)),
            r"not orthonormal \(products are off by up to 3.0e\+00\); Basis.of_span",
        ),
        (lambda: Basis(NAME, torch.eye(3) * torch.nan), "not orthonormal"),
        (
            lambda: Basis(NAME, torch.eye(3), "x", {"rows": [1]}),
            r"details \['rows'\] are no texts, numbers or switches",
        ),
        (lambda: Basis.of_span(NAME, torch.zeros(2, 3)), "span 0 dimensions of .*; expected at least 1"),
        (lambda: Basis.of_span(NAME, torch.ones(2, 3), n_dims=2), "span 1 dimensions of .*; expected at least 2"),
        (lambda: Basis.of_span(NAME, torch.ones(2, 3), n_dims=0), "n_dims is 0, expected a whole number >= 1, or None"),
        (lambda: Basis.of_span(NAME, torch.full((2, 3), torch.inf)), "expected finite real numbers"),
        (
            lambda: Basis.of_mean_differences(NAME, draw(4, 3), torch.zeros(4)),
            r"needs two of them; all 4 rows have \[0.0\]",
        ),
        (lambda: Basis.of_mean_differences(NAME, draw(4, 3), torch.zeros(3)), r"one for each row: a tensor \[3\]"),
        (lambda: Basis.random(NAME, 4, 3), "n_dims is 4; expected at most d, 3"),
    ],
)
def test_refusals(make, text):
    with unchecked(), pytest.raises(AlignmentError, match=text):
        make()
