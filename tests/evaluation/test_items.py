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
    names = [file.items[line].id for line in (1, 5, 6)]
    assert len(set(names)) == 3
    assert file.items == {
        1: ContinuationItem(id=names[0], continuation=" John"),
        3: ContinuationItem(id="ids", continuation=(3, 4)),
        4: MultipleChoiceItem(id="7", question="Who ?", choices=(" John", (5,)), answer=1),
        5: MultipleChoiceItem(id=names[1], question=(1, 2), choices=(" a", " b"), answer=1),
        6: MultipleChoiceItem(id=names[2], question="Who ?", choices=(" a", " b"), answer=None),
    }


UNNAMED = [
    {"continuation": " John"},
    {"tokens": [3, 4]},
    {"tokens": [34]},
    {"continuation": "[3, 4]"},
    {"question": "Who ?", "choices": [" a", " b"]},
    {"question": "Who ?", "choices": [" a", " b"], "answer": 0},
    {"question": "Who ?", "choices": [" a", [5]]},
]


@given(order=st.permutations(UNNAMED), on_top=st.integers(0, 2))
def test_names_of_items_without_ids_stay_with_their_content(order, on_top, tmp_path_factory):
    """The number of the line was the id: a line put on top gave every item the id of the one before it."""
    path = tmp_path_factory.getbasetemp() / "unnamed.jsonl"

    def name_lines(lines) -> dict[str, str]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = read_items(path)
        assert file.errors == []
        return {json.dumps(line): item.id for line, item in zip(lines, file.items.values(), strict=True)}

    before = name_lines(UNNAMED)
    assert len(set(before.values())) == len(UNNAMED)
    moved = name_lines([*({"id": str(i), "continuation": " new"} for i in range(on_top)), *order])
    assert {line: moved[line] for line in before} == before


def test_equal_items_without_ids_are_counted(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"continuation": " a"}\n{"source": 2, "continuation": " a"}\n{"continuation": " a"}\n')
    name, *others = [item.id for item in read_items(path).items.values()]
    assert others == [f"{name}-2", f"{name}-3"]


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
    '{"id": null, "continuation": "x"}': "the id is None; expected a string that is not empty, or an integer",
    '{"id": "", "continuation": "x"}': "the id is ''; expected a string that is not empty, or an integer",
    '{"continuation": "x", "continuation": "y"}': "has the keys 'continuation' more than once; expected each once",
    '{"continuation": "\\ud800"}': "'continuation' is no text: it holds half of a surrogate pair",
    '{"continuation": "x", "id": ' + "7" * 5000 + "}": "cannot be read (Exceeds the limit",
    '{"tokens": ' + "[" * 100_000 + "]" * 100_000 + "}": "is JSON nested too deeply to be read",
    '{"tokens": ' + "[" * 400 + "]" * 400 + "}": "'tokens' is [[[[",
    '{"question": "x"}': "lacks 'choices'; a multiple-choice item has 'question' and 'choices'",
    '{"choices": ["x", "y"]}': "lacks 'question'",
    '{"question": "x", "choices": ["y"]}': "'choices' is ['y']; expected a list of at least two texts",
    '{"question": "x", "choices": ["y", 3]}': "'choice 1' is 3; expected text or a list of token ids",
    '{"question": "x", "choices": ["y", "z"], "answer": 2}': "'answer' is 2; expected 0 to 1, or the text of one",
    '{"question": "x", "choices": ["y", "y"], "answer": "y"}': "'answer' is 'y'; expected 0 to 1",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_bad_line_is_named_and_costs_only_itself(tmp_path, line):
    """An integer of 5,000 digits, or lists nested deeply, cost the whole file."""
    path = tmp_path / "items.jsonl"
    path.write_text('{"continuation": " a"}\n' + line + '\n{"continuation": " b"}\n')
    file = read_items(path)
    assert list(file.items) == [1, 3]
    [error] = file.errors
    assert str(error).startswith(f"{path}, line 2: ")
    assert BAD_LINES[line] in str(error)
    assert len(str(error)) < 400


def test_bytes_that_are_no_text_and_ids_that_repeat(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"id": 3, "continuation": "a"}\n\xff\xfe{}\n{"id": "3", "continuation": "b"}\n')
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
