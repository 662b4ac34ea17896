"""Rows of base prompts, sources and labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.alignment import AlignmentError, CausalModel, Counterfactuals
from hooklens.errors import CheckpointError
from tests.alignment.pair_model import N, make_pair_model
from tests.annotations import unchecked

PAIRS = make_pair_model()


def draw(n=40, **options) -> Counterfactuals:
    return Counterfactuals.draw(PAIRS.causal_model, PAIRS.prompts, n, **options)


@given(seed=st.integers(0, 50), variables=st.sampled_from([["first"], ["second"], ["second", "first"], None]))
@settings(max_examples=20)
def test_labels_are_those_of_each_prompts_own_part(seed, variables):
    data = draw(seed=seed, variables=variables, changed=False)
    assert data.variables == tuple(variables or ["first", "second"])
    for row in range(len(data)):
        x, y = data.base[row].tolist()
        x = int(data.sources["first"][row, 0]) if "first" in data.sources else x
        y = int(data.sources["second"][row, 1]) if "second" in data.sources else y
        assert int(data.labels[row]) == 2 * N + N * x + (y - N)
    if "first" in data.sources:
        assert torch.equal(data.base_values["first"], data.base[:, 0])
        assert torch.equal(data.source_values["first"], data.sources["first"][:, 0])


def test_only_rows_with_another_answer_are_drawn_unless_asked():
    data = draw(60)
    assert len(data) == 60
    assert not bool((data.labels == PAIRS.causal_model.run(data.base)["output"]).any())
    data = draw(200, changed=False)
    assert bool((data.labels == PAIRS.causal_model.run(data.base)["output"]).any())


def test_the_seed_draws_and_nothing_else():
    state = torch.get_rng_state()
    one, same, other = draw(seed=3), draw(seed=3), draw(seed=4)
    assert torch.equal(one.base, same.base)
    assert torch.equal(one.sources["first"], same.sources["first"])
    assert not torch.equal(one.base, other.base)
    assert torch.equal(torch.get_rng_state(), state)


@given(seed=st.integers(0, 30), held_out=st.sampled_from([0.1, 0.25, 0.5]))
@settings(max_examples=20)
def test_both_sides_have_all_rows_and_no_row_in_common(seed, held_out):
    """Of 9 prompts and one variable there are few different rows, so that many come several times."""
    data = draw(300, variables=["first"], seed=seed, changed=False)

    def listed(part: Counterfactuals) -> list[tuple[int, ...]]:
        return [tuple(row) for row in torch.cat([part.base, part.sources["first"], part.labels[:, None]], 1).tolist()]

    learned, test = data.split(held_out, seed=seed)
    assert sorted(listed(learned) + listed(test)) == sorted(listed(data))
    assert not set(listed(learned)) & set(listed(test))
    n_kinds = len(set(listed(data)))
    assert len(set(listed(test))) == round(held_out * n_kinds)
    again = data.split(held_out, seed=seed)
    assert listed(again[1]) == listed(test)


def test_shuffled_labels_are_the_same_ones_elsewhere():
    data = draw(60)
    shuffled = data.shuffle_labels(seed=1)
    assert torch.equal(shuffled.labels.sort().values, data.labels.sort().values)
    assert not torch.equal(shuffled.labels, data.labels)
    assert torch.equal(shuffled.base, data.base)


def test_a_row_without_a_change_has_the_base_as_source():
    data = Counterfactuals.of(PAIRS.causal_model, PAIRS.prompts, {"first": PAIRS.prompts})
    assert torch.equal(data.labels, PAIRS.causal_model.run(PAIRS.prompts)["output"])


def test_a_file_holds_all(tmp_path):
    data = draw(20)
    data.save(tmp_path / "rows.safetensors")
    read = Counterfactuals.load(tmp_path / "rows.safetensors")
    assert read.variables == data.variables
    assert read.pos == data.pos
    assert torch.equal(read.base, data.base)
    assert torch.equal(read.labels, data.labels)
    for word in ("sources", "base_values", "source_values"):
        found, kept = getattr(read, word), getattr(data, word)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
    # Values need not be known.
    bare = Counterfactuals(base=data.base, sources=data.sources, labels=data.labels, pos=0)
    bare.save(tmp_path / "bare.safetensors")
    read = Counterfactuals.load(tmp_path / "bare.safetensors")
    assert (read.pos, dict(read.base_values)) == (0, {})


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read counterfactuals"):
        Counterfactuals.load(tmp_path / "x")


IDS = torch.tensor([[0, 3], [1, 4]])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Counterfactuals(base=IDS, sources={}, labels=IDS[:, 0]), "there are no sources"),
        (
            lambda: Counterfactuals(base=IDS, sources={"a": IDS[:1]}, labels=IDS[:1, 0]),
            r"sources\['a'\] are a tensor \[1, 2\] of .*; labels are a tensor \[1\].*base is a tensor \[2, 2\]",
        ),
        (
            lambda: Counterfactuals(base=IDS, sources={"a": IDS}, labels=IDS[:, 0], pos=2),
            r"pos is 2, expected .* -2 to 1",
        ),
        (
            lambda: Counterfactuals(base=IDS, sources={"a": IDS}, labels=IDS[:, 0], base_values={"b": IDS[:, 0]}),
            r"base_values\['b'\] are a tensor",
        ),
        (lambda: draw(variables=["frist"]), r"no variable 'frist'. Did you mean 'first'"),
        (lambda: draw(0), r"n is 0, expected a whole number >= 1"),
        (lambda: Counterfactuals.draw(PAIRS.causal_model, IDS[:1], 5), r"0 of 5 rows found in 200 rounds"),
        (
            lambda: Counterfactuals.of(
                CausalModel({"a": lambda tokens: tokens[:, 0]}, lambda a: a - 1), IDS, {"a": IDS}
            ),
            r"no answer \(a negative label\) to rows \[0\]",
        ),
        (lambda: draw(10).split(1.0), r"held_out is 1.0, expected a share above 0 and below 1"),
        (lambda: draw(10).take([0]).split(0.5), r"split: 0.5 of 1 different rows leaves one side empty"),
    ],
)
def test_refusals(make, text):
    with unchecked(), pytest.raises(AlignmentError, match=text):
        make()
