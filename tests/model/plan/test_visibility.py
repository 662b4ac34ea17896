"""Tests of hooklens.model.plan.visibility: every rule and every mask against loops over rows, queries and keys."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.config import RotaryPositions
from hooklens.model.plan.documents import DocumentColumns
from hooklens.model.plan.positions import TokenPlan
from hooklens.model.plan.visibility import Causal, Padding, SameDocument, Sight, Visibility, Window
from tests.model.networks import Allocations, make_config, make_model, pad_rows, random_tokens

CPU = torch.device("cpu")


@dataclass
class Drawn:
    """A call, and the same in plain numbers.

    Attributes:
        plan: the call.
        real: which of past + new columns are tokens, of each row.
        positions: the position of each key, of each row.
        documents: the document of each key, of each row.
    """

    plan: TokenPlan
    real: list[list[bool]]
    positions: list[list[int]]
    documents: list[list[int]]

    def is_far(self, window, row, query, key):
        """Whether a key lies outside of a query's window: too far back, and without causality too far ahead."""
        ahead = self.positions[row][key] - self.positions[row][query]
        return ahead <= -window or (not self.plan.causal and ahead >= window)

    def sees(self, window, row, query, key):
        """Whether a token sees a key: not later, a token, of its document, and not too far off."""
        query += self.plan.n_past
        if window is not None and self.is_far(window, row, query, key):
            return False
        later = self.plan.causal and key > query
        return not later and self.real[row][key] and self.documents[row][key] == self.documents[row][query]

    def queries(self):
        """The row and the number of each query that is a token."""
        n_past = self.plan.n_past
        return [(r, q) for r in range(self.plan.batch) for q in range(self.plan.n_new) if self.real[r][n_past + q]]


@st.composite
def drawn_calls(draw, *, shared_past=False):
    batch, n_new, n_past = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 4))

    def draw_mask(rows, columns):
        row = st.lists(st.booleans(), min_size=columns, max_size=columns)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    new = draw_mask(batch, n_new) if draw(st.booleans()) else None
    past = None
    if n_past and draw(st.booleans()):
        past = draw_mask(1 if shared_past else draw(st.sampled_from([1, batch])), n_past)
    given_positions = None
    if not n_past and draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        given_positions = torch.tensor(draw(st.lists(
            st.lists(st.integers(0, 9), min_size=n_new, max_size=n_new), min_size=rows, max_size=rows,
        )))  # fmt: skip
    plan = TokenPlan(
        batch=batch, n_new=n_new, n_past=n_past, device=CPU, attention_mask=new, past_mask=past,
        positions=given_positions, causal=draw(st.booleans()),
    )  # fmt: skip
    past = torch.ones(1, n_past, dtype=torch.bool) if past is None else past
    new = torch.ones(batch, n_new, dtype=torch.bool) if new is None else new
    real = torch.cat([past.expand(batch, -1), new], 1).tolist()
    documents, restarts = [[0] * plan.n_keys] * batch, False
    if draw(st.booleans()):
        restarts = draw(st.booleans())
        documents = draw_documents(draw, plan, real)
        plan.documents = DocumentColumns(torch.tensor(documents), plan.key_mask, goes_on=False, restarts=restarts)
    if given_positions is None:
        # Padding stands at position 0.
        positions = [
            [row[key] * (sum(row[(of.index(of[key]) if restarts else 0) : key + 1]) - 1) for key in range(plan.n_keys)]
            for row, of in zip(real, documents, strict=True)
        ]
    else:
        positions = given_positions.expand(batch, -1).tolist()
    return Drawn(plan, real, positions, documents)


def draw_documents(draw, plan, real):
    """A document for each column, counted along the row; padding is of the one before it."""
    starts = st.lists(st.booleans(), min_size=plan.n_keys, max_size=plan.n_keys)
    rows = []
    for row in real:
        flags = draw(starts)
        rows.append([sum(flags[i] and row[i] for i in range(key + 1)) for key in range(plan.n_keys)])
    return rows


@st.composite
def key_ranges(draw, plan):
    """All keys, those in the cache, those of the call, or any others that stand one after another."""
    start = draw(st.integers(0, plan.n_keys - 1))
    stop = draw(st.integers(start + 1, plan.n_keys))
    return draw(st.sampled_from([plan.keys, plan.new, range(start, stop), *([plan.past] if plan.n_past else [])]))


def hidden_by(sight, drawn, keys):
    """What a sight hides, `[batch query key]`."""
    shape = (drawn.plan.batch, 1, drawn.plan.n_new, len(keys))
    if sight.is_causal:
        assert sight.mask is None
        assert len(keys) == drawn.plan.n_new
        return torch.ones(shape[2:], dtype=torch.bool).triu(1).expand(shape)[:, 0]
    if sight.mask is None:
        return torch.zeros(shape, dtype=torch.bool)[:, 0]
    assert set(sight.mask.unique().tolist()) <= {0.0, -torch.inf}
    return (sight.mask == -torch.inf).expand(shape)[:, 0]


WINDOWS = st.none() | st.integers(1, 10)


@settings(max_examples=150)
@given(data=st.data(), drawn=drawn_calls(), window=WINDOWS, explicit=st.booleans())
def test_a_sight_hides_what_loops_hide(data, drawn, window, explicit):
    keys = data.draw(key_ranges(drawn.plan))
    sight = drawn.plan.visibility(window).sight(keys, torch.float64, explicit=explicit)
    hidden = hidden_by(sight, drawn, keys)
    for row, query in drawn.queries():
        expected = [not drawn.sees(window, row, query, key) for key in keys]
        assert hidden[row, query].tolist() == expected
    assert sight.can_hide_all or not hidden.all(-1).any()
    assert not (explicit and sight.is_causal)
    if sight.mask is not None:
        assert sight.mask.dtype == torch.float64


@given(data=st.data(), drawn=drawn_calls(), size=st.integers(1, 10))
def test_each_rule_alone(data, drawn, size):
    plan, keys = drawn.plan, data.draw(key_ranges(drawn.plan))
    hides = {
        Causal(): lambda row, query, key: key > plan.n_past + query,
        Window(size): lambda row, query, key: (
            drawn.positions[row][key] <= drawn.positions[row][plan.n_past + query] - size
        ),
        Window(size, both_ways=True): lambda row, query, key: (
            abs(drawn.positions[row][key] - drawn.positions[row][plan.n_past + query]) >= size
        ),
        Padding(): lambda row, query, key: not drawn.real[row][key],
        SameDocument(): lambda row, query, key: drawn.documents[row][key] != drawn.documents[row][plan.n_past + query],
    }
    shape = (plan.batch, 1, plan.n_new, len(keys))
    for rule, expected in hides.items():
        acts = rule.acts(plan, keys)
        found = rule.hide(plan, keys).expand(shape) if acts else torch.zeros(shape, dtype=torch.bool)
        for row, query in drawn.queries():
            wanted = [expected(row, query, key) for key in keys]
            # What does not act hides nothing of what the other rules leave.
            if not acts and isinstance(rule, Window):
                at, of = plan.n_past + query, drawn.documents[row]
                within = [drawn.real[row][key] and (rule.both_ways or key <= at) and of[key] == of[at] for key in keys]
                wanted = [hides and sees for hides, sees in zip(wanted, within, strict=True)]
            assert found[row, 0, query].tolist() == wanted, rule


@pytest.mark.parametrize(
    ("rule", "sides", "keys", "acts"),
    [
        (Causal(), {"n_new": 3}, range(3), True),
        (Causal(), {"n_new": 1}, range(1), False),
        (Causal(), {"n_new": 1, "n_past": 4}, range(5), False),
        (Causal(), {"n_new": 3, "n_past": 4}, range(4), False),
        (Causal(), {"n_new": 3, "n_past": 4}, range(5), False),
        (Causal(), {"n_new": 3, "n_past": 4}, range(6), True),
        (Causal(), {"n_new": 3, "n_past": 4}, range(4, 7), True),
        (Window(4), {"n_new": 4}, range(4), False),
        (Window(3), {"n_new": 4}, range(4), True),
        (Window(4), {"n_new": 1, "n_past": 4}, range(5), True),
        (Window(5), {"n_new": 1, "n_past": 4}, range(5), False),
        (Window(3, both_ways=True), {"n_new": 3, "causal": False}, range(3), False),
        (Window(2, both_ways=True), {"n_new": 3, "causal": False}, range(3), True),
        (Window(3, both_ways=True), {"n_new": 4, "causal": False}, range(2, 4), True),
        (SameDocument(), {"n_new": 3}, range(3), False),
        (Window(9), {"n_new": 2, "positions": torch.tensor([[0, 9]])}, range(2), True),
        (Padding(), {"n_new": 2}, range(2), False),
        (Padding(), {"n_new": 2, "attention_mask": torch.tensor([[True, False]])}, range(2), True),
        (Padding(), {"n_new": 2, "n_past": 1, "past_mask": torch.tensor([[False]])}, range(3), True),
    ],
)
def test_when_rules_act(rule, sides, keys, acts):
    plan = TokenPlan(batch=1, device=CPU, **sides)
    assert rule.acts(plan, keys) is acts


@pytest.mark.parametrize(
    ("sides", "keys", "window", "is_causal"),
    [
        ({"n_new": 3}, range(3), None, True),
        ({"n_new": 3}, range(3), 3, True),
        ({"n_new": 3}, range(3), 2, False),
        ({"n_new": 3, "positions": torch.tensor([[0, 5, 6]])}, range(3), None, True),
        ({"n_new": 3, "positions": torch.tensor([[0, 5, 6]])}, range(3), 5, False),
        ({"n_new": 3, "n_past": 2}, range(2, 5), None, True),
        ({"n_new": 3, "n_past": 2}, range(5), None, False),
        ({"n_new": 3, "n_past": 2}, range(2), None, False),
        ({"n_new": 3, "n_past": 2}, range(1, 5), None, False),
        ({"n_new": 1}, range(1), None, False),
        ({"n_new": 3, "attention_mask": torch.tensor([[True, True, False]])}, range(3), None, False),
    ],
)
def test_the_causal_flag_is_for_the_tokens_of_the_call_among_themselves(sides, keys, window, is_causal):
    visibility = TokenPlan(batch=1, device=CPU, **sides).visibility(window)
    assert visibility.sight(keys, torch.float32).is_causal is is_causal
    # Scores that are computed one by one need the mask itself.
    explicit = visibility.sight(keys, torch.float32, explicit=True)
    assert not explicit.is_causal
    if is_causal:
        assert explicit.mask.tolist() == torch.full((3, 3), -torch.inf).triu(1)[None, None].tolist()


def test_one_token_after_a_cache_is_told_nothing():
    visibility = TokenPlan(batch=2, n_new=1, n_past=6, device=CPU).visibility(None)
    for keys in (range(7), range(6), range(6, 7)):
        assert visibility.sight(keys, torch.float32) == Sight(is_causal=False, mask=None, can_hide_all=False)


@given(data=st.data(), drawn=drawn_calls(shared_past=True), window=WINDOWS)
def test_queries_of_all_rows_as_those_of_one(data, drawn, window):
    """Rows that read the same cached keys are asked about them in one go, their queries one after another."""
    plan, visibility = drawn.plan, drawn.plan.visibility(window)
    if not plan.n_past:
        return
    whole = visibility.sight(plan.past, torch.float64)
    folded = visibility.sight(plan.past, torch.float64, fold_rows=plan.batch)
    assert not folded.is_causal
    assert folded.can_hide_all == whole.can_hide_all
    assert (folded.mask is None) == (whole.mask is None)
    if folded.mask is None:
        return
    assert folded.mask.shape[:2] == (1, 1)
    hidden = (folded.mask == -torch.inf).expand(1, 1, plan.batch * plan.n_new, plan.n_past)[0, 0]
    for row, query in drawn.queries():
        expected = [not drawn.sees(window, row, query, key) for key in plan.past]
        assert hidden[row * plan.n_new + query].tolist() == expected


@given(data=st.data(), drawn=drawn_calls(), window=WINDOWS, explicit=st.booleans())
def test_first_rows(data, drawn, window, explicit):
    plan, visibility = drawn.plan, drawn.plan.visibility(window)
    keys, n_rows = data.draw(key_ranges(plan)), data.draw(st.integers(1, plan.batch))
    whole = visibility.sight(keys, torch.float64, explicit=explicit)
    first = visibility.first_rows(n_rows).sight(keys, torch.float64, explicit=explicit)
    assert (first.is_causal, first.can_hide_all) == (whole.is_causal, whole.can_hide_all)
    assert (first.mask is None) == (whole.mask is None)
    if first.mask is None:
        return
    assert len(first.mask) in (1, n_rows)
    assert first.mask.untyped_storage().data_ptr() == whole.mask.untyped_storage().data_ptr()
    shape = (n_rows, 1, plan.n_new, len(keys))
    assert torch.equal(first.mask.expand(shape), whole.mask.expand(plan.batch, *shape[1:])[:n_rows])


@given(drawn=drawn_calls(shared_past=True), window=WINDOWS)
def test_first_rows_as_one_row(drawn, window):
    plan, visibility = drawn.plan, drawn.plan.visibility(window)
    if not plan.n_past:
        return
    for n_rows in range(1, plan.batch + 1):
        folded = visibility.first_rows(n_rows).sight(plan.past, torch.float64, fold_rows=n_rows)
        if folded.mask is None:
            continue
        hidden = (folded.mask == -torch.inf).expand(1, 1, n_rows * plan.n_new, plan.n_past)[0, 0]
        for row, query in drawn.queries():
            if row < n_rows:
                expected = [not drawn.sees(window, row, query, key) for key in plan.past]
                assert hidden[row * plan.n_new + query].tolist() == expected


def test_windows_go_by_the_positions_that_were_given():
    plan = TokenPlan(batch=2, n_new=3, device=CPU, positions=torch.tensor([[0, 7, 8], [3, 4, 5]]))
    mask = plan.visibility(3).sight(plan.keys, torch.float32).mask
    hidden = [[[False, True, True], [True, False, True], [True, False, False]],
              [[False, True, True], [False, False, True], [False, False, False]]]  # fmt: skip
    assert (mask[:, 0] == -torch.inf).tolist() == hidden


def test_padding_is_no_distance():
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    sight = TokenPlan(batch=2, n_new=4, device=CPU, attention_mask=mask).visibility(2).sight(range(4), torch.float32)
    assert (sight.mask[:, 0, 3] == -torch.inf).tolist() == [[False, True, True, False], [True, True, False, False]]


@dataclass(frozen=True)
class InHalves:
    """No token of the second half of a row sees the first one."""

    starts: int

    def acts(self, sides, keys):
        return keys.start < self.starts

    def hide(self, sides, keys):
        query = torch.arange(sides.n_past, sides.n_past + sides.n_new)[:, None]
        key = torch.arange(keys.start, keys.stop)[None]
        return ((query >= self.starts) & (key < self.starts))[None, None]


def test_a_restriction_is_one_more_rule():
    plan = TokenPlan(batch=1, n_new=4, device=CPU)
    sight = Visibility(plan, (Causal(), InHalves(2))).sight(plan.keys, torch.float32)
    assert not sight.is_causal
    assert (sight.mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert Visibility(plan, (Causal(), InHalves(0))).sight(plan.keys, torch.float32).is_causal
    assert Visibility(plan, ()).sight(plan.keys, torch.float32) == Sight(False, None, False)


def test_a_sight_is_made_once_for_each_question():
    plan = TokenPlan(batch=2, n_new=3, n_past=4, device=CPU)
    visibility = plan.visibility(2)
    asked = [
        {"keys": plan.keys, "dtype": torch.float32},
        {"keys": plan.keys, "dtype": torch.float64},
        {"keys": plan.past, "dtype": torch.float32},
        {"keys": plan.past, "dtype": torch.float32, "fold_rows": 2},
        {"keys": plan.new, "dtype": torch.float32},
    ]
    first = [visibility.sight(**question) for question in asked]
    assert all(visibility.sight(**question) is sight for question, sight in zip(asked, first, strict=True))
    assert len({id(sight.mask) for sight in first}) == len(asked)
    assert [sight.mask.dtype for sight in first] == [question["dtype"] for question in asked]


class TestInACall:
    """Whole calls of a network: 29 tokens, so that no other tensor has as many entries as queries times keys."""

    N = 29

    def square(self, batch=2, heads=4):
        pairs = self.N * self.N
        return (pairs, batch * pairs, heads * pairs, batch * heads * pairs)

    @torch.no_grad()
    def test_what_nobody_asks_for_is_not_made(self):
        model, tokens = make_model(make_config(positions=RotaryPositions(dim=2))), random_tokens(2, self.N)
        with Allocations() as made:
            model(tokens)
        assert made.with_numel(*self.square()) == []
        with Allocations() as made:
            model.run_with_cache(tokens, names_filter="*pattern")
        assert made.with_numel(*self.square())

    @torch.no_grad()
    def test_a_network_that_is_not_causal_needs_no_mask(self):
        model, tokens = make_model(make_config(causal=False, windows=(None, self.N))), random_tokens(2, self.N)
        with Allocations() as made:
            model(tokens)
        assert made.with_numel(*self.square()) == []

    @torch.no_grad()
    @pytest.mark.parametrize("causal", [True, False])
    def test_documents_take_one_mask_for_all_layers_and_heads(self, causal):
        model, tokens = make_model(make_config(n_layers=3, causal=causal)), random_tokens(2, self.N)
        with Allocations() as made:
            model(tokens, document_borders=[0, 7, 20])
        masks = [shape for name, shape in made.sizes if "masked_fill" in name and shape[-2:-1] == (self.N,)]
        assert [shape[:3] for shape in masks] == [(1, 1, self.N)]
        assert made.with_numel(4 * self.N**2, 8 * self.N**2) == []

    @torch.no_grad()
    def test_a_window_as_wide_as_the_call_is_no_window(self):
        model, tokens = make_model(make_config(windows=(self.N, self.N + 1))), random_tokens(2, self.N)
        with Allocations() as made:
            model(tokens)
        assert made.with_numel(*self.square()) == []

    @torch.no_grad()
    def test_a_mask_is_made_once_for_all_layers_with_the_same_window(self):
        n = 24
        model = make_model(make_config(n_layers=5, windows=(3, None, 3, 3, None)))
        ids, mask = pad_rows([random_tokens(1, n)[0], random_tokens(1, n - 3)[0]], "left")

        def masks_made(**keywords):
            with Allocations() as made:
                model(ids, **keywords)
            # Rows of a mask may be longer in memory.
            return [shape[:3] for name, shape in made.sizes if "masked_fill" in name and shape[-2] == n <= shape[-1]]

        assert masks_made(attention_mask=mask) == [(2, 1, n), (2, 1, n)]
        assert masks_made() == [(1, 1, n)]

    @torch.no_grad()
    @pytest.mark.parametrize("n_new", [1, 2])
    def test_a_row_of_padding_only_hides_nothing_from_other_rows(self, n_new):
        """With one new token each, the window of the first row was taken for that of all rows."""
        model = make_model(make_config(positions=RotaryPositions(dim=2), windows=(2, None)))
        kv = model.prefill(random_tokens(1, 5))
        ids, mask = random_tokens(2, n_new, seed=3), torch.tensor([[0], [1]]).expand(2, n_new)
        alone = model(ids[1:], past_kv_cache=kv)
        # 1e-10: other shapes, other order of float64 sums.
        together = model(ids, attention_mask=mask, past_kv_cache=kv)
        torch.testing.assert_close(together[1:], alone, rtol=1e-10, atol=1e-10)
