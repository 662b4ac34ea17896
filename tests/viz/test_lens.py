import pytest
import torch

import hooklens as hl
from hooklens import analysis, viz
from hooklens.errors import InputError
from tests.annotations import unchecked

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def model():
    return hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")


@pytest.fixture(scope="module")
def table(model):
    _, cache = model.run_with_cache(TEXT)
    return analysis.lens.logit_lens(model, cache, pos_slice=None, k=3, target="Mary")


def test_the_table_of_a_logit_lens_is_shown(model, table):
    """The top line is the model's own prediction: what it finds likeliest, and how likely."""
    tokens = model.to_str_tokens(TEXT)
    made = viz.lens(table, tokens=tokens)
    probabilities, ids = model(TEXT)[0].softmax(-1).max(-1)
    # Both are the same float32 computation but for the chunks of the vocabulary.
    torch.testing.assert_close(made.values[0, 0], probabilities, atol=1e-5, rtol=0)
    assert list(made.texts[0][0]) == [model.to_single_str_token(int(token)) for token in ids]
    assert made.columns == ("pos", tuple(tokens))
    assert made.rows[1][0].startswith("final")
    assert made.rows[1][-1] == "0_pre"
    # Three tokens are told of each cell.
    assert made.details[0][0][2].count("; ") == 2
    assert made.description[0] == f"{len(made.rows[1])} stream x {len(tokens)} pos"


@pytest.mark.parametrize("by", ["kl", "entropy", "target_logprob"])
def test_other_columns_are_colours(table, by):
    made = viz.lens(table, by=by)
    line = table[(table.stream == "0_pre") & (table.pos == 4)]
    assert float(made.values[0, -1, 4]) == pytest.approx(line[by].item())


def test_ranks_are_shown_by_their_reciprocals(table):
    made = viz.lens(table, by="reciprocal_rank")
    line = table[(table.stream == "1_pre") & (table.pos == 2)]
    assert float(made.values[0, -2, 2]) == pytest.approx(1 / (1 + line.target_rank.item()))


def test_values_are_shown_with_the_last_layer_on_top():
    made = viz.lens(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [["a", "b"], ["c", "d"]], streams=["low", "high"])
    assert made.rows == ("stream", ("high", "low"))
    assert made.values[0].tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert made.texts == ((("c", "d"), ("a", "b")),)
    assert made.scale == "amount"


def test_what_does_not_go_together_is_refused(table):
    with pytest.raises(InputError, match="lens: the table has no row 3; it has 0"):
        viz.lens(table, row=3)
    with pytest.raises(InputError, match="lens: the table lacks target_rank; it has stream"):
        viz.lens(table.drop(columns="target_rank"), by="reciprocal_rank")
    with pytest.raises(InputError, match="lens: by='logit'; expected one of 'probability'"), unchecked():
        viz.lens(table, by="logit")
    with pytest.raises(InputError, match="lens: tokens are 2 tokens, and the table goes to position 14"):
        viz.lens(table, tokens=["a", "b"])
    with pytest.raises(InputError, match="texts go with values"):
        viz.lens(table, [["a"]])
    with pytest.raises(InputError, match=r"expected \[layer pos\]"), unchecked():
        viz.lens(torch.zeros(2))
