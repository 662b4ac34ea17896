"""Tests of hooklens.evaluation.multiple_choice: choices scored as continuations, and the readings of "best"."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens import HookedCausalLM, edits
from hooklens.errors import InputError
from hooklens.evaluation import MultipleChoiceItem, multiple_choice
from hooklens.evaluation.multiple_choice import (
    READINGS,
    check_target_delimiter,
    judge_choices,
    measure_accuracy,
)
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
            sums.append((math.fsum(score_alone(model, question, ids)), len(ids), choice))
            assert found == pytest.approx(sums[-1][0], abs=1e-10)
        by_reading = {
            "": [total for total, _, _ in sums],
            "_norm": [total / len(choice[1:]) for total, _, choice in sums],
            "_bytes": [total / len(choice[1:].encode()) for total, _, choice in sums],
            "_per_token": [total / n for total, n, _ in sums],
            "_per_byte": [total / len(choice.encode()) for total, _, choice in sums],
        }
        assert by_reading.keys() == READINGS.keys()
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
    assert table.attrs["accuracy"]["acc"] == 0.5
    assert list(table.attrs["accuracy"]) == ["acc", "acc_norm", "acc_bytes", "logprob_per_token", "logprob_per_byte"]
    unknown = multiple_choice(model, [ITEMS[2]], progress=False)
    assert unknown.attrs["accuracy"] == {}


def describe(text: str | None, logprob: float, n_tokens: int = 1) -> dict:
    return {"continuation": text, "logprob": logprob, "logprob_per_token": logprob / n_tokens}


@pytest.mark.parametrize("delimiter", [" ", ""])
def test_issue_of_the_delimiter(delimiter):
    """The choices "a" and "abcdef" with -1.2 and -4.5: the delimiter counted as a character, so the first was picked.

    The harness picks the second by `acc_norm`, of choices to which it puts a delimiter and of ones that have none.
    """
    described = [describe(f"{delimiter}a", -1.2), describe(f"{delimiter}abcdef", -4.5)]
    record = judge_choices(described, 1, delimiter)
    assert (record["predicted"], record["predicted_norm"], record["predicted_bytes"]) == (0, 1, 1)
    assert (record["correct"], record["correct_norm"], record["correct_bytes"]) == (False, True, True)
    assert record["predicted_per_byte"] == (0 if delimiter else 1)


def judge_as_the_harness(choices: list[str], lls: list[float], gold: int) -> dict[str, float]:
    """`acc`, `acc_norm` and `acc_bytes` by their definition in lm-evaluation-harness 0.4.13.

    Its choices have no delimiter; it divides the sums by the lengths in numpy, and takes `argmax`.
    """
    n_characters = np.array([len(choice) for choice in choices], dtype=float)
    n_bytes = np.array([len(choice.encode("utf-8")) for choice in choices], dtype=float)
    with np.errstate(divide="ignore"):
        compared = {"acc": np.array(lls), "acc_norm": lls / n_characters, "acc_bytes": lls / n_bytes}
    return {name: float(np.argmax(values) == gold) for name, values in compared.items()}


# Few values of each, so that ties come up: sums of a quarter divide without rounding.
CHOICES = st.lists(
    st.tuples(st.text(alphabet="aé漢🙂 ", max_size=4), st.integers(-12, -1).map(lambda quarters: quarters / 4)),
    min_size=2,
    max_size=5,
)


@given(choices=CHOICES, delimiter=st.sampled_from([" ", "", "\n", "A: "]), data=st.data())
def test_readings_with_the_harness_names_are_the_harness_readings(choices, delimiter, data):
    """`acc_norm` was by bytes, with the delimiter; text beyond ASCII, ties and empty choices included."""
    texts, lls = [text for text, _ in choices], [total for _, total in choices]
    gold = data.draw(st.integers(0, len(texts) - 1))
    described = [describe(delimiter + text, total) for text, total in choices]
    found = measure_accuracy([judge_choices(described, gold, delimiter)])
    for name, value in judge_as_the_harness(texts, lls, gold).items():
        assert found[name] == value


def test_what_cannot_be_counted_is_not_judged_and_what_is_no_number_is_wrong():
    """Items whose scores are NaN were left out of the accuracy, as if nobody had asked."""
    no_text = judge_choices([describe(None, -1.0), describe(" a", -2.0)], 0)
    assert (no_text["correct"], no_text["correct_per_token"]) == (True, True)
    assert [no_text[f"correct{suffix}"] for suffix in ("_norm", "_bytes", "_per_byte")] == [None] * 3
    broken = judge_choices([describe(" b", math.nan), describe(" a", -2.0)], 0)
    assert [broken[f"predicted{suffix}"] for suffix in READINGS] == [None] * 5
    assert measure_accuracy([broken]) == dict.fromkeys(READINGS.values(), 0.0)


def test_the_delimiter_reaches_the_scores():
    model = reader()
    table = multiple_choice(model, ITEMS[:1], target_delimiter="", progress=False)
    default = multiple_choice(model, ITEMS[:1], progress=False)
    choices = ITEMS[0]["choices"]
    for found, removed in ((table, 0), (default, 1)):
        [sums], [divided] = found["logprobs"], found["logprobs_norm"]
        assert divided == [total / len(choice[removed:]) for total, choice in zip(sums, choices, strict=True)]
    with pytest.raises(InputError, match="target_delimiter is None, expected a text"):
        check_target_delimiter(None)


def test_ids_without_a_text_are_read_by_their_tokens():
    model = reader()
    model = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg)
    items = [{"question": [4, 5], "choices": [[6], [7, 8]], "answer": 0}]
    table = multiple_choice(model, items, progress=False)
    assert set(table.attrs["accuracy"]) == {"acc", "logprob_per_token"}


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
    too_long = {"question": [4] * (N_CTX - 1), "choices": [[4], [4, 2]]}
    lines = ['{"id": "1", "question": " John", "choices": [" gave", " said"]}', "nonsense", '{"continuation": " x"}']
    path.write_text("\n".join([*lines, json.dumps(too_long)]))
    table = multiple_choice(reader(), path, progress=False)
    assert table["id"].tolist() == ["1"]
    assert [error.partition(": ")[0] for error in table.attrs["errors"]] == [f"{path}, line {n}" for n in (2, 3, 4)]
    path.write_text('{"continuation": " x"}\n')
    with pytest.raises(InputError, match=r"(?s)holds no multiple-choice item that can.*line 1: is a continuation"):
        multiple_choice(reader(), path, progress=False)
    path.write_text(json.dumps(too_long))
    with pytest.raises(InputError, match=r"(?s)holds no multiple-choice item that can.*line 1: .*do not fit behind"):
        multiple_choice(reader(), path, progress=False)


def test_bad_items_are_refused_all_at_once_before_anything_is_answered():
    """An item that does not fit the context was found when its turn came, and what was answered before was lost."""
    model = reader()
    with pytest.raises(InputError, match=r"(?s)item 0: lacks 'choices'.*item 1: is a continuation"):
        multiple_choice(model, [{"question": "x"}, {"continuation": "x"}], progress=False)
    with pytest.raises(InputError, match="there is no item to answer"):
        multiple_choice(model, [], progress=False)
    long = {"question": [4] * (N_CTX - 1), "choices": [[4], [4, 2]]}
    outside = {"question": [4], "choices": [[4], [99999]]}
    ran: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda tensor, hook: ran.append(len(tensor)))]):
        message = (
            r"(?s)^item 1: continuations 1 \(2 tokens\) do not fit behind a prefix of 47 tokens.*"
            r"item 2: lacks 'choices'.*item 4: continuation 1: token ids outside the vocabulary: 99999"
        )
        with pytest.raises(InputError, match=message):
            multiple_choice(model, [ITEMS[0], long, {"question": "x"}, ITEMS[1], outside], progress=False)
        assert ran == []
        # Behind a prefix only that has run.
        with pytest.raises(InputError, match=r"^item 1: .*behind a prefix of 57 tokens"):
            multiple_choice(model, [ITEMS[0], long], prefix=PREFIX, progress=False)
        assert len(ran) == 1
