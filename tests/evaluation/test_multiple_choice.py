"""Tests of hooklens.evaluation.multiple_choice: choices scored as continuations, and three readings of "best"."""

import math

import pytest

from hooklens import edits
from hooklens.errors import InputError
from hooklens.evaluation import MultipleChoiceItem, multiple_choice
from tests.evaluation.networks import N_CTX, PREFIX, reader, score_alone

ITEMS = [
    {"question": " John gave a drink to", "choices": [" Mary", " John", " Mary and John"], "answer": 0},
    {"id": "second", "question": " Mary said goodbye to", "choices": [" Mary", " John gave"], "answer": " John gave"},
    {"question": " John", "choices": [" gave", " said goodbye"]},
]


@pytest.mark.parametrize("shared", [True, False])
def test_choices_score_as_their_full_sequences_alone(shared):
    model = reader()
    table = multiple_choice(model, ITEMS, prefix=PREFIX if shared else None, progress=False)
    assert table["id"].tolist() == ["0", "second", "2"]
    assert table["n_choices"].tolist() == [3, 2, 2]
    for item, (_, row) in zip(ITEMS, table.iterrows(), strict=True):
        question = model.to_tokens((PREFIX if shared else "") + item["question"])[0].tolist()
        sums = []
        for choice, found in zip(item["choices"], row["logprobs"], strict=True):
            ids = model.to_tokens(choice, prepend_bos=False)[0].tolist()
            sums.append((math.fsum(score_alone(model, question, ids)), len(ids), len(choice.encode())))
            assert found == pytest.approx(sums[-1][0], abs=1e-10)
        by_reading = {
            "": [total for total, _, _ in sums],
            "_per_token": [total / n for total, n, _ in sums],
            "_per_byte": [total / n for total, _, n in sums],
        }
        for suffix, values in by_reading.items():
            assert row[f"logprobs{suffix}"] == pytest.approx(values, abs=1e-10)
            assert row[f"predicted{suffix}"] == values.index(max(values))


def test_accuracy_counts_items_whose_answer_is_known():
    model = reader()
    predicted = multiple_choice(model, ITEMS, prefix=PREFIX, progress=False)["predicted"].tolist()
    items = [{**item, "answer": best} for item, best in zip(ITEMS, predicted, strict=True)]
    items[1]["answer"] = 1 - predicted[1]
    del items[2]["answer"]
    table = multiple_choice(model, items, prefix=PREFIX, progress=False)
    assert table["correct"].tolist() == [True, False, None]
    assert table.attrs["accuracy"]["logprob"] == 0.5
    assert set(table.attrs["accuracy"]) == {"logprob", "logprob_per_token", "logprob_per_byte"}
    unknown = multiple_choice(model, [ITEMS[2]], progress=False)
    assert unknown.attrs["accuracy"] == {}


def test_edits_act_on_the_whole_sequence():
    model = reader()
    edit = edits.Scale("blocks.0.hook_resid_pre", 3.0, pos=slice(2, None))
    item = MultipleChoiceItem(id="x", question=" John gave a drink to", choices=(" Mary", " John and Mary"))
    table = multiple_choice(model, [item], prefix=PREFIX, edits=[edit], progress=False)
    question = model.to_tokens(PREFIX + " John gave a drink to")[0].tolist()
    for choice, found in zip(item.choices, table["logprobs"][0], strict=True):
        ids = model.to_tokens(choice, prepend_bos=False)[0].tolist()
        assert found == pytest.approx(math.fsum(score_alone(model, question, ids, [edit])), abs=1e-10)


def test_items_are_read_from_a_file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": " John", "choices": [" gave", " said"]}\nnonsense\n{"continuation": " x"}\n')
    table = multiple_choice(reader(), path, progress=False)
    assert table["id"].tolist() == ["1"]
    assert [error.partition(": ")[0] for error in table.attrs["errors"]] == [f"{path}, line {n}" for n in (2, 3)]
    path.write_text('{"continuation": " x"}\n')
    with pytest.raises(InputError, match=r"(?s)holds no multiple-choice item.*line 1: is a continuation"):
        multiple_choice(reader(), path, progress=False)


def test_bad_items_are_refused_all_at_once():
    model = reader()
    with pytest.raises(InputError, match=r"(?s)item 0: lacks 'choices'.*item 1: is a continuation"):
        multiple_choice(model, [{"question": "x"}, {"continuation": "x"}], progress=False)
    with pytest.raises(InputError, match="there is no item to answer"):
        multiple_choice(model, [], progress=False)
    long = {"question": [4] * (N_CTX - 1), "choices": [[4], [4, 2]]}
    with pytest.raises(InputError, match=r"continuations 1 \(2 tokens\) do not fit behind a prefix of 47 tokens"):
        multiple_choice(model, [long], progress=False)
