"""Which rows go through the model, as rows end."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.generation.prompts import Prompts
from hooklens.generation.rows import Rows


def make_rows(n_prompts, *, n_samples=1, keeps_all=False):
    ids = torch.arange(2 * n_prompts).view(n_prompts, 2)
    prompts = Prompts(ids=ids, mask=None, lengths=[2] * n_prompts, n_before=[0] * n_prompts)
    return Rows(prompts, n_samples=n_samples, max_new_tokens=50, keeps_all=keeps_all, needs_table=True)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), keeps_all=st.booleans(), n_samples=st.integers(1, 3)
)
def test_rows_end_by_themselves_whatever_leaves_the_batch(lengths, keeps_all, n_samples):
    """Token t of row r is 100 r + t, made from the rows the batch says it holds."""
    lengths = lengths * n_samples
    rows = make_rows(len(lengths) // n_samples, n_samples=n_samples, keeps_all=keeps_all)
    step = 0
    while not rows.done:
        active = list(rows.active)
        rows.append(torch.tensor([100 * row + step for row in active]))
        ends = ["length" if lengths[active[place]] == step + 1 else None for place in rows.places]
        staying = rows.end(ends)
        assert staying is None or [active[place] for place in staying] == rows.active
        assert [rows.active[place] for place in rows.places] == [
            row for row, length in enumerate(lengths) if length > step + 1
        ]
        # Ended rows are at most an eighth of the batch, unless none may leave.
        assert keeps_all or rows.done or len(rows.finished_places) * 8 < len(rows.active)
        step += 1
    assert rows.new_ids == [[100 * row + t for t in range(length)] for row, length in enumerate(lengths)]


def test_table_holds_prompts_and_new_tokens_of_the_rows_that_are_left():
    rows = make_rows(3)
    rows.append(torch.tensor([7, 8, 9]))
    assert rows.end([None, "length", None]) == [0, 2]
    rows.append(torch.tensor([10, 11]))
    assert rows.table.tolist() == [[0, 1, 7, 10], [4, 5, 9, 11]]
    assert rows.ids.padding is None
