"""The rotation that is trained, and which rows variables get."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.alignment.das.rotation import Rotation


def make(d=8, dims=None, *, boundless=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    dims = {"a": 2, "b": 3} if dims is None else dims
    return Rotation(d, dims, boundless=boundless, generator=generator, dtype=dtype, device=torch.device("cpu"))


def all_rows(rotation):
    return torch.cat(list(rotation.hard_bases().values()))


@pytest.mark.parametrize("dims", [{"a": 2, "b": 3}, {"a": 8}, {"a": 1}])
def test_rows_are_orthonormal_before_and_after_a_step_and_parted_as_asked(dims):
    rotation = make(dims=dims)
    first = all_rows(rotation)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        target = torch.arange(8.0).double()
        sum(((rows @ target) ** 2).sum() for rows, _ in rotation.bases().values()).backward()
        optimizer.step()
    rows = all_rows(rotation)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=1e-12, atol=1e-12)
    assert {name: len(part) for name, part in rotation.hard_bases().items()} == dims
    assert not torch.allclose(rows, first)


def test_the_first_rows_are_the_generators_and_nothing_else_is_drawn():
    state = torch.get_rng_state()
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(all_rows(one), all_rows(same))
    assert not torch.equal(all_rows(one), all_rows(other))
    # Uniform: the mean square of an entry of a unit vector of 8 entries is 1/8, its own spread over 64 draws 0.02.
    mean = torch.stack([all_rows(make(dims={"a": 1}, seed=seed))[0] ** 2 for seed in range(64)]).mean(0)
    assert float((mean - 1 / 8).abs().max()) < 0.08


@settings(max_examples=30)
@given(
    widths=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=3),
    temperature=st.sampled_from([5.0, 1.0, 0.05]),
)
def test_shares_are_those_of_the_formula(widths, temperature):
    d = 10
    rotation = make(d, {str(place): 1 for place in range(len(widths))}, boundless=True)
    rotation.widths.data = torch.tensor(widths, dtype=torch.float64)
    rotation.temperature = temperature
    clamped = [max(width, 1e-3) for width in widths]
    total = max(1.0, sum(clamped))
    ends = [0.0]
    for width in clamped:
        ends.append(ends[-1] + d * width / total)
    for number, (rows, shares) in enumerate(rotation.bases().values()):
        assert rows.shape == (d, d)
        for i in range(d):
            place = torch.tensor(i + 0.5, dtype=torch.float64)
            expected = torch.sigmoid((ends[number + 1] - place) / temperature)
            if number:
                expected = expected * torch.sigmoid((place - ends[number]) / temperature)
            torch.testing.assert_close(shares[i], expected, rtol=1e-9, atol=1e-12)
    assert float(torch.as_tensor(rotation.width_penalty()).detach()) == pytest.approx(min(sum(clamped), 1.0))
    parts = list(rotation.hard_bases().values())
    rows = torch.cat(parts)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=1e-12, atol=1e-12)
    assert all(len(part) >= 1 for part in parts)
    assert len(rows) <= d


def test_rounded_boundaries_keep_the_rows_whose_shares_are_above_a_half():
    rotation = make(10, {"a": 1, "b": 1}, boundless=True)
    rotation.widths.data = torch.tensor([0.32, 0.41], dtype=torch.float64)
    rotation.temperature = 1e-3
    for name, (rows, shares) in rotation.bases().items():
        torch.testing.assert_close(rotation.hard_bases()[name], rows[shares > 0.5].detach())
    assert [len(part) for part in rotation.hard_bases().values()] == [3, 4]


def test_widths_have_gradients():
    rotation = make(10, {"a": 1, "b": 1}, boundless=True)
    [(_, first), (_, second)] = rotation.bases().values()
    (first.sum() + 2 * second.sum() + rotation.width_penalty()).backward()
    assert bool((rotation.widths.grad != 0).all())
