"""Blocks: tables say what they leave out, numbers stand at the right."""

from hooklens.display import facts, fold, render, table
from hooklens.display.blocks import write_cell


def test_a_table_says_how_many_rows_it_leaves_out():
    rows = [(f"r{number}", number) for number in range(7)]
    made, left_out = table(("name", "n"), rows, caption="rows", most=3, more="there")
    html = render(made)
    assert html.count("<tr>") == 4
    assert "r3" not in html
    assert render(left_out) == '<p class="hl-note">4 of 7 rows are left out; there</p>'
    assert len(table(("name", "n"), rows, caption="rows")) == 1


def test_columns_of_numbers_alone_stand_at_the_right():
    [made] = table(("a", "b", "c"), [("x", 1.0, True), ("y", 2, False)], caption="c", styles={(0, 1): "color:red"})
    html = render(made)
    assert html.count('class="hl-number"') == 3
    assert '<td style="color:red" class="hl-number">1.00</td>' in html
    assert '<th scope="row">x</th>' in html


def test_cells():
    assert [write_cell(cell) for cell in (None, True, False, 1200, 0.5, float("nan"), "a")] == [
        "", "yes", "no", "1,200", "0.500", "nan", "a",
    ]  # fmt: skip


def test_folds_and_facts():
    assert render(fold("more", facts({"a": "1"}), is_open=True)) == (
        '<details open=""><summary>more</summary><dl class="hl-facts"><dt>a</dt><dd>1</dd></dl></details>'
    )
