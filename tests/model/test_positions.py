"""Tests of hooklens.model.positions: every mask against loops over rows, queries and keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.model.positions import TokenPlan
from tests.annotations import unchecked

CPU = torch.device("cpu")


@st.composite
def plans(draw):
    batch, n_new, n_past = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    masks = {}
    if draw(st.booleans()):
        masks["attention_mask"] = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=n_new, max_size=n_new), min_size=batch, max_size=batch))
        )
    if n_past and draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        masks["past_mask"] = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=n_past, max_size=n_past), min_size=rows, max_size=rows))
        )
    plan = TokenPlan(batch=batch, n_new=n_new, n_past=n_past, device=CPU, **masks)
    past = masks.get("past_mask", torch.ones(1, n_past, dtype=torch.bool)).expand(batch, -1)
    new = masks.get("attention_mask", torch.ones(batch, n_new, dtype=torch.bool))
    return plan, torch.cat([past, new], 1).tolist()


@settings(deadline=None, max_examples=150)
@given(plan_and_real=plans(), window=st.none() | st.integers(1, 10))
def test_everything_follows_from_the_mask(plan_and_real, window):
    plan, real = plan_and_real
    # Positions count real tokens; padding has none.
    index = [[sum(row[: key + 1]) - 1 if row[key] else -1 for key in range(plan.n_keys)] for row in real]
    assert plan.token_index.tolist() == [row[plan.n_past :] for row in index]
    assert plan.n_tokens.tolist() == [sum(row) for row in real]
    assert plan.positions.expand(plan.batch, -1).tolist() == [[max(i, 0) for i in row[plan.n_past :]] for row in index]
    assert plan.key_positions.expand(plan.batch, -1).tolist() == [[max(i, 0) for i in row] for row in index]

    def sees(row, query, key):
        """Whether a real query sees a key: not later, real, and among the `window` latest real ones."""
        return key <= query and row[key] and (window is None or sum(row[key : query + 1]) <= window)

    hidden = plan.hidden(window)
    shape = (plan.batch, 1, plan.n_new, plan.n_keys)
    hidden = torch.zeros(shape, dtype=torch.bool) if hidden is None else hidden.expand(shape)
    for row in range(plan.batch):
        for query in range(plan.n_new):
            if not real[row][plan.n_past + query]:
                continue
            expected = [not sees(real[row], plan.n_past + query, key) for key in range(plan.n_keys)]
            assert hidden[row, 0, query].tolist() == expected
    additive = plan.additive_mask(window, torch.float64)
    if additive is not None:
        assert torch.equal(additive == -torch.inf, hidden[: len(additive)])
        assert set(additive.unique().tolist()) <= {0.0, -torch.inf}
    assert not (plan.is_causal_only(window) and (hidden != torch.ones(shape[2:]).triu(1).bool()).any())


@settings(deadline=None)
@given(data=st.data(), plan_and_real=plans())
def test_select_columns_counts_over_the_real_tokens_of_the_call(data, plan_and_real):
    plan, real = plan_and_real
    columns = [[c for c in range(plan.n_new) if row[plan.n_past + c]] for row in real]
    wanted = data.draw(
        st.integers(-5, 4)
        | st.lists(st.integers(-5, 4), min_size=1, max_size=3)
        | st.builds(slice, st.none() | st.integers(-5, 4), st.none() | st.integers(-5, 5), st.sampled_from([None, 2]))
    )
    try:
        chosen = [
            row[wanted]
            if isinstance(wanted, slice)
            else [row[i] for i in ([wanted] if isinstance(wanted, int) else wanted)]
            for row in columns
        ]
    except IndexError:
        chosen = None
    every = isinstance(wanted, slice) and wanted == slice(None)
    if not every and (chosen is None or len({len(row) for row in chosen}) > 1):
        with pytest.raises(InputError, match=r"logits_at: .* (out of range|selects different numbers of tokens)"):
            plan.select_columns(wanted)
        return
    found = plan.select_columns(wanted)
    if isinstance(found, slice):
        found = torch.arange(plan.n_new).expand(plan.batch, -1)[:, found]
    assert found.tolist() == ([list(range(plan.n_new))] * plan.batch if every else chosen)


def test_positions_given_are_taken():
    plan = TokenPlan(batch=2, n_new=3, device=CPU, positions=torch.tensor([[4, 5, 9]]))
    assert plan.positions.tolist() == [[4, 5, 9]]
    assert plan.n_positions == 10
    assert not plan.is_contiguous
    assert TokenPlan(batch=2, n_new=3, device=CPU).is_contiguous


def test_what_no_block_asks_for_is_not_computed():
    plan = TokenPlan(batch=2, n_new=1000, device=CPU)
    assert plan.is_causal_only(None)
    assert plan.is_causal_only(1000)
    assert not plan.is_causal_only(999)
    assert plan._hidden == {}
    assert TokenPlan(batch=2, n_new=1, n_past=99, device=CPU).hidden(None) is None


@pytest.mark.parametrize(
    ("mask", "wanted", "text"),
    [
        (None, 4, r"logits_at: \[4\] out of range; this call runs 4 positions"),
        (None, [0, -5, 9], r"logits_at: \[-5, 9\] out of range"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], 2, r"logits_at: 2 out of range in row 1, which has 2 real tokens"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], slice(1, None), r"different numbers of tokens in rows of lengths \[4, 2\]"),
        (None, slice(None, None, -1), r"logits_at: slice\(None, None, -1\) runs backwards; give a list of positions"),
        (None, [], r"logits_at is empty; give at least one position, or return_type=None for no logits"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [], r"logits_at is empty"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], slice(None, None, -1), r"runs backwards"),
    ],
)
def test_refusals(mask, wanted, text):
    mask = None if mask is None else torch.tensor(mask).bool()
    plan = TokenPlan(batch=2, n_new=4, device=CPU, attention_mask=mask)
    with unchecked(), pytest.raises(InputError, match=text):
        plan.select_columns(wanted)
