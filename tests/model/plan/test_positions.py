"""Tests of hooklens.model.plan.positions: every mask against loops over rows, queries and keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.model.plan.positions import TokenPlan
from tests.annotations import unchecked
from tests.model.networks import Allocations

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


@settings(max_examples=150)
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

    shape = (plan.batch, 1, plan.n_new, plan.n_keys)
    sight = plan.visibility(window).sight(plan.keys, torch.float64, explicit=True)
    assert not sight.is_causal
    hidden = torch.zeros(shape, dtype=torch.bool) if sight.mask is None else (sight.mask == -torch.inf).expand(shape)
    for row in range(plan.batch):
        for query in range(plan.n_new):
            if not real[row][plan.n_past + query]:
                continue
            expected = [not sees(real[row], plan.n_past + query, key) for key in range(plan.n_keys)]
            assert hidden[row, 0, query].tolist() == expected
    if sight.mask is not None:
        assert sight.mask.dtype == torch.float64
        assert set(sight.mask.unique().tolist()) <= {0.0, -torch.inf}
    assert sight.can_hide_all or not hidden.all(-1).any()
    told = plan.visibility(window).sight(plan.keys, torch.float64)
    if told.is_causal:
        assert told.mask is None
        assert torch.equal(hidden, torch.ones(shape[2:], dtype=torch.bool).triu(1).expand(shape))
    else:
        assert (told.mask is None) == (sight.mask is None)
        assert told.mask is None or torch.equal(told.mask, sight.mask)


@given(data=st.data(), plan_and_real=plans())
def test_choose_columns_counts_over_the_real_tokens_of_the_call(data, plan_and_real):
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
    unequal = chosen is None or len({len(row) for row in chosen}) > 1
    if unequal or not chosen[0] or any(len(set(row)) < len(row) for row in chosen):
        reasons = r"out of range|selects different numbers of tokens|selects no|more than once"
        with pytest.raises(InputError, match=rf"logits_at.* ({reasons})"):
            plan.choose_columns(wanted)
        return
    found = plan.choose_columns(wanted)
    # What is taken of a tensor that holds its own column in every row.
    columns_of_call = torch.arange(plan.n_new).expand(plan.batch, -1)
    assert found.take(columns_of_call[..., None])[..., 0].tolist() == chosen
    assert found.take(columns_of_call).tolist() == chosen
    held = found.columns.tolist() if isinstance(found.columns, torch.Tensor) else [found.columns] * plan.batch
    assert held == chosen
    # The chosen columns are the same tokens as in the whole call.
    index = plan.token_index.tolist()
    expected = [[index[row][column] for column in chosen[row]] for row in range(plan.batch)]
    assert found.token_index.tolist() == expected
    assert found.n_tokens.tolist() == [sum(row) for row in real]
    if found.positions_by_column is not None:
        assert [found.positions_by_column] * plan.batch == expected
    assert (found.phase, found.length, found.n_run) == (plan.phase, plan.n_keys, plan.n_new)


def test_a_slice_without_ends_is_every_token():
    plan, tensor = TokenPlan(batch=2, n_new=4, device=CPU), torch.randn(2, 4, 3)
    assert torch.equal(plan.choose_columns(slice(None)).take(tensor), tensor)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    with pytest.raises(InputError, match="different numbers of tokens"):
        TokenPlan(batch=2, n_new=4, device=CPU, attention_mask=mask).choose_columns(slice(None))


@given(plan_and_real=plans(), seed=st.integers(0, 99))
def test_single_tokens_are_rows_of_one_column(plan_and_real, seed):
    plan, real = plan_and_real
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(plan.batch, (3,), generator=generator)
    columns = torch.randint(plan.n_new, (3,), generator=generator)
    chosen, index = plan.choose_tokens(rows, columns), plan.token_index.tolist()
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert chosen.token_index.tolist() == [[index[row][column]] for row, column in pairs]
    assert chosen.columns.tolist() == [[column] for _, column in pairs]
    assert chosen.n_tokens.tolist() == [sum(real[row]) for row, _ in pairs]
    assert chosen.positions_by_column is None
    assert (chosen.phase, chosen.length, chosen.n_run) == (plan.phase, plan.n_keys, plan.n_new)


def test_neighbouring_columns_are_a_view():
    plan, tensor = TokenPlan(batch=2, n_new=5, device=CPU), torch.randn(2, 5, 3)
    for wanted, expected in ((slice(1, 4), tensor[:, 1:4]), (-1, tensor[:, 4:]), ([2, 3], tensor[:, 2:4])):
        taken = plan.choose_columns(wanted).take(tensor)
        assert torch.equal(taken, expected)
        assert taken.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_positions_given_are_taken():
    plan = TokenPlan(batch=2, n_new=3, device=CPU, positions=torch.tensor([[4, 5, 9]]))
    assert plan.positions.tolist() == [[4, 5, 9]]
    assert plan.n_positions == 10
    assert not plan.is_contiguous
    assert TokenPlan(batch=2, n_new=3, device=CPU).is_contiguous


def test_key_positions_are_those_given_where_nothing_is_cached():
    given_positions = torch.tensor([[4, 5, 9], [0, 2, 1]])
    plan = TokenPlan(batch=2, n_new=3, device=CPU, positions=given_positions)
    assert plan.key_positions.tolist() == given_positions.tolist()


def test_what_is_the_same_for_several_layers_is_made_once():
    plan, made = TokenPlan(batch=1, n_new=2, device=CPU), []
    assert plan.remember("answer", lambda: made.append(1) or 42) == 42
    assert plan.remember("answer", lambda: made.append(1) or 43) == 42
    assert made == [1]
    assert plan.visibility(3) is plan.visibility(3)
    assert plan.visibility(3) is not plan.visibility(None)
    assert plan.token_index is plan.token_index
    assert plan.key_positions is plan.key_positions


def test_what_no_block_asks_for_is_not_computed():
    def sight(plan, window):
        return plan.visibility(window).sight(plan.keys, torch.float32)

    with Allocations() as made:
        plan = TokenPlan(batch=2, n_new=1000, device=CPU)
        assert sight(plan, None).is_causal
        assert sight(plan, 1000).is_causal
        one_more = sight(TokenPlan(batch=2, n_new=1, n_past=99, device=CPU), None)
    assert one_more == (False, None, False)
    # Positions of the keys at most, never queries times keys.
    assert all(torch.Size(shape).numel() <= 1000 for _, shape in made.sizes)
    with Allocations() as made:
        assert not sight(plan, 999).is_causal
    assert made.with_numel(1000 * 1000)


@pytest.mark.parametrize(
    ("mask", "wanted", "text"),
    [
        (None, 4, r"logits_at: 4 out of range; there are 4 positions run in this call, 0 to 3"),
        (None, [0, -5, 9], r"logits_at: \[-5, 9\] out of range"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], 2, r"logits_at: row 1: 2 out of range; there are 2 real tokens, 0 to 1"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], slice(1, None), r"different numbers of tokens in rows of lengths \[4, 2\]"),
        (None, slice(None, None, -1), r"logits_at: slice\(None, None, -1\) runs backwards; give a list of positions"),
        (None, [], r"logits_at=\[\] is empty; expected an int, a slice, or a list of at least one int"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [], r"logits_at=\[\] is empty"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], slice(None, None, -1), r"runs backwards"),
        (None, slice(4, 9), r"logits_at=slice\(4, 9, None\) selects none of the 4 positions run in this call"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], slice(4, 9), r"logits_at=slice\(4, 9, None\) selects no token"),
        (None, [1, 1], r"logits_at: \[1, 1\] names \[1\] more than once; name each entry once"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [1, -1], r"logits_at: row 1: \(1, -1\) names \[1\] more than once"),
        (None, [True, False, True, False], r"logits_at=.* is a mask; give the numbers of its entries"),
    ],
)
def test_refusals(mask, wanted, text):
    mask = None if mask is None else torch.tensor(mask).bool()
    plan = TokenPlan(batch=2, n_new=4, device=CPU, attention_mask=mask)
    with unchecked(), pytest.raises(InputError, match=text):
        plan.choose_columns(wanted)
