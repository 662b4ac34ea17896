"""Tests of hooklens.evaluation.items: lines of JSON, good and bad."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.evaluation import ContinuationItem, MultipleChoiceItem, read_items


def test_every_kind_of_item_is_read(tmp_path):
    lines = [
        '{"continuation": " John"}',
        "",
        '{"id": "ids", "tokens": [3, 4]}',
        '{"id": 7, "question": "Who ?", "choices": [" John", [5]], "answer": 1, "source": "kept out"}',
        '{"question": [1, 2], "choices": [" a", " b"], "answer": " b"}',
        '{"question": "Who ?", "choices": [" a", " b"]}',
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines))
    file = read_items(path)
    assert file.errors == []
    assert file.items == {
        1: ContinuationItem(id="1", continuation=" John"),
        3: ContinuationItem(id="ids", continuation=(3, 4)),
        4: MultipleChoiceItem(id="7", question="Who ?", choices=(" John", (5,)), answer=1),
        5: MultipleChoiceItem(id="5", question=(1, 2), choices=(" a", " b"), answer=1),
        6: MultipleChoiceItem(id="6", question="Who ?", choices=(" a", " b"), answer=None),
    }


BAD_LINES = {
    '{"continuation": " John"': "is not JSON (Expecting ',' delimiter at column 25)",
    "[1]": "is a JSON list; expected an object",
    '{"text": "x"}': "has the keys ['text']; expected 'continuation' (text), or 'tokens' (ids), or 'question' and",
    '{"continuation": "x", "tokens": [1]}': "has the keys ['continuation', 'tokens']; expected",
    '{"continuation": ""}': "'continuation' is empty: there is nothing to score",
    '{"continuation": [1]}': "'continuation' is [1]; expected a string",
    '{"tokens": "x"}': "'tokens' is 'x'; expected a list of ids",
    '{"tokens": []}': "'tokens' is empty",
    '{"tokens": [1.5]}': "'tokens' is [1.5]; expected text or a list of token ids",
    '{"id": null, "continuation": "x"}': "the id is None; expected a string or an integer",
    '{"question": "x"}': "lacks 'choices'; a multiple-choice item has 'question' and 'choices'",
    '{"choices": ["x", "y"]}': "lacks 'question'",
    '{"question": "x", "choices": ["y"]}': "'choices' is ['y']; expected a list of at least two texts",
    '{"question": "x", "choices": ["y", 3]}': "'choice 1' is 3; expected text or a list of token ids",
    '{"question": "x", "choices": ["y", "z"], "answer": 2}': "'answer' is 2; expected 0 to 1, or the text of one",
    '{"question": "x", "choices": ["y", "y"], "answer": "y"}': "'answer' is 'y'; expected 0 to 1",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_named_and_costs_only_itself(tmp_path, line):
    path = tmp_path / "items.jsonl"
    path.write_text('{"continuation": " a"}\n' + line + '\n{"continuation": " b"}\n')
    file = read_items(path)
    assert list(file.items) == [1, 3]
    [error] = file.errors
    assert str(error).startswith(f"{path}, line 2: ")
    assert BAD_LINES[line] in str(error)


def test_bytes_that_are_no_text_and_ids_that_repeat(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"id": 3, "continuation": "a"}\n\xff\xfe{}\n{"continuation": "b"}\n')
    file = read_items(path)
    assert list(file.items) == [1]
    assert [error.line for error in file.errors] == [2, 3]
    assert "UTF-8" in file.errors[0].message
    assert file.errors[1].message == "the id '3' stands in line 1 already; ids must differ"


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read items from .*nowhere.jsonl: No such file"):
        read_items(tmp_path / "nowhere.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "tokens", "continuation", "question", "choices", "answer"]), inner)
    ),
    max_leaves=12,
)


@given(values=JSON)
def test_any_json_is_an_item_or_an_error(values, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(values) + "\n")
    file = read_items(path)
    assert len(file.items) + len(file.errors) == 1
