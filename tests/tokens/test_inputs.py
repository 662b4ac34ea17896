"""Inputs of every kind: the right result, or an error of HookLens that says what was found and expected."""

from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.arguments import read_flag
from hooklens.errors import HookLensError, InputError
from hooklens.tokens import get_token_position, is_text, read_input, read_tokens, to_str_tokens, to_string, to_tokens
from hooklens.tokens.inputs import read_prepend_bos
from tests.annotations import unchecked
from tests.tokens.tokenizers import PLAIN

ROWS = [[4, 5, 6], [6, 5, 4]]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FORMS = {
    "nested list": ROWS,
    "nested tuple": tuple(map(tuple, ROWS)),
    "list of tensors": [torch.tensor(row) for row in ROWS],
    "list of arrays": [np.array(row) for row in ROWS],
    "lists of numpy ints": [[np.int32(token) for token in row] for row in ROWS],
    "lists of tensors without axes": [[torch.tensor(token) for token in row] for row in ROWS],
    "column-major array": np.asfortranarray(np.array(ROWS)),
    "reversed array": np.array(ROWS[::-1])[::-1],
    "uint64 array": np.array(ROWS, dtype=np.uint64),
    "uint16 array": np.array(ROWS, dtype=np.uint16),
    **{str(dtype): torch.tensor(ROWS, dtype=dtype) for dtype in INTEGERS},
}
REFUSED = {
    "None": (None, "the input is None; expected text, a list of texts, or token ids"),
    "a float": (2.5, "the input is a float"),
    "a bool": (True, "the input is a bool"),
    "an int": (5, r"the input is an int.*a prompt of one token is \[5\]"),
    "bytes": (b"the cat", r"the input is a bytes.*\.decode\(\) makes text of bytes"),
    "a set": ({4, 5}, r"the input is a set.*list\(\.\.\.\) makes a list of it"),
    "a generator": ((token for token in [4]), "the input is a generator"),
    "an encoding": (
        UserDict(input_ids=[4], attention_mask=[1]),
        r'a UserDict with the keys .*encoding\["input_ids"\], attention_mask=encoding\["attention_mask"\]',
    ),
    "a dict": ({"text": "the"}, "the input is a dict with the keys 'text'; expected text or token ids"),
    "no entries": ([], r"no prompt was given: the input is empty \(\[\]\)"),
    "no ids": ([[]], r"token ids are empty: rows \[0\]"),
    "no columns": (torch.zeros(2, 0, dtype=torch.long), r"token ids are empty \(shape \[2, 0\]"),
    "ragged rows": ([[4, 5], [6]], r"rows of different length \(2, 1 token ids\).*pad them and pass attention_mask"),
    "nested deeper": ([[[4]]], "row 0 of the input is nested too deeply|nested too deeply"),
    "three axes": (torch.zeros(1, 1, 1, dtype=torch.long), r"shape \[1, 1, 1\]; expected \[pos\] or \[batch pos\]"),
    "no axes": (torch.tensor(4), r"shape \[\]; expected \[pos\] or \[batch pos\]"),
    "float tensor": (torch.ones(2), "dtype torch.float32; expected an integer dtype"),
    "bool tensor": (torch.ones(2, dtype=torch.bool), "dtype torch.bool; expected an integer dtype"),
    "complex tensor": (torch.ones(2, dtype=torch.complex64), "dtype torch.complex64; expected an integer dtype"),
    "float array": (np.ones(2), "an array of dtype float64; expected token ids, an integer dtype"),
    "array of texts": (np.array(["the", "cat"]), r"an array of dtype <U3; .*its list goes in: \.tolist\(\)"),
    "floats": ([4.0, 5.0], r"a list that holds a float \(entry 0\); expected texts only, token ids only"),
    "bools": ([True, False], r"a list that holds a bool \(entry 0\)"),
    "numpy bools": ([np.True_], r"a list that holds a bool"),
    "text and ids": (["the", 4], r"holds the text 'the' \(entry 0\), an int \(entry 1\)"),
    "ids and text": ([4, "the"], r"holds an int \(entry 0\), the text 'the' \(entry 1\)"),
    "rows and ids": ([[4], 5], r"holds a list \(entry 0\), an int \(entry 1\)"),
    "rows of floats": ([[4.0]], r"row 0 of the input is a list that holds a float"),
    "rows of texts": ([["the"]], r"row 0 of the input is a list that holds the text 'the'"),
    "bytes in a list": ([b"the"], r"a list that holds a bytes \(entry 0\)"),
    "huge": ([2**70], "holds 1180591620717411303424, which is no token id"),
    "huge array": (np.array([2**64 - 1], dtype=np.uint64), "holds 18446744073709551615, which is no token id"),
}


class TestIds:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_becomes_rows_of_int64(self, form):
        read = read_input(FORMS[form])
        assert read.ids.dtype == torch.int64
        assert read.ids.tolist() == ROWS
        assert read.is_batch
        assert to_string(PLAIN, FORMS[form]) == ["the cat sat", "sat cat the"]
        assert to_str_tokens(PLAIN, FORMS[form])[0] == ["the", "cat", "sat"]

    @pytest.mark.parametrize("form", [form for form in FORMS if "column" not in form])
    def test_one_row_is_a_batch_of_one(self, form):
        row = FORMS[form][0]
        read = read_input(row)
        assert read.ids.tolist() == [ROWS[0]]
        assert not read.is_batch
        assert to_string(PLAIN, row) == "the cat sat"
        assert get_token_position(PLAIN, "sat", row) == 2

    def test_ids_stay_where_they_are(self):
        ids = torch.tensor(ROWS)
        assert read_input(ids).ids is ids


class TestTexts:
    def test_texts(self):
        assert read_input("the") == (["the"], False)
        assert read_input(("the", "cat")) == (["the", "cat"], True)
        assert read_input([np.str_("the")]) == (["the"], True)

    @pytest.mark.parametrize("given", ["", "the", ["the"], ["the", 4], (np.str_("the"),)])
    def test_is_text(self, given):
        assert is_text(given)

    @pytest.mark.parametrize("given", [None, [], [4, "the"], b"the", [b"the"], {"the": 1}, torch.tensor([4])])
    def test_is_no_text(self, given):
        assert not is_text(given)

    def test_to_tokens_takes_no_ids(self):
        with unchecked(), pytest.raises(InputError, match=r"the text is token ids \[1, 2\]; expected a text"):
            to_tokens(PLAIN, [4, 5])


class TestRefusals:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_each_says_what_was_found(self, kind):
        given, text = REFUSED[kind]
        with pytest.raises(InputError, match=f"(?s){text}"):
            read_input(given)

    @pytest.mark.parametrize("kind", [kind for kind in REFUSED if "ragged" not in kind and "an int" not in kind])
    @pytest.mark.parametrize("call", [to_string, to_str_tokens])
    def test_decoding_refuses_the_same(self, kind, call):
        """Rows of different length, single ids and rows without ids can be decoded."""
        given = REFUSED[kind][0]
        with unchecked():
            try:
                found = call(PLAIN, given)
            except HookLensError:
                return
        assert found in ("", "the", [], [""], [[]], ["", ""], [[], []], ["the"])

    def test_hints_end_the_message(self):
        with pytest.raises(InputError, match=r"a prompt is an object; expected .*ints\) \(of a Pair: its clean\)$"):
            read_input(object(), what="a prompt", hint=" (of a Pair: its clean)")

    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=3), st.binary(max_size=2)
    )

    @settings(max_examples=300)
    @given(given=st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
    def test_anything_else_is_an_error_of_ours(self, given):
        for call in (
            lambda: read_tokens(given, PLAIN, d_vocab=9),
            lambda: to_string(PLAIN, given),
            lambda: to_str_tokens(PLAIN, given),
            lambda: get_token_position(PLAIN, 4, given),
            lambda: get_token_position(PLAIN, given, [4, 5]),
            lambda: to_tokens(PLAIN, given),
        ):
            try:
                with unchecked():
                    call()
            except HookLensError:
                continue


class TestSwitches:
    @pytest.mark.parametrize("given", [True, False, np.True_, np.False_])
    def test_bools(self, given):
        assert read_flag(given, what="truncate") is bool(given)
        assert read_prepend_bos(given) is bool(given)

    def test_prepend_bos_may_be_none(self):
        assert read_prepend_bos(None) is None
        with pytest.raises(InputError, match="truncate is None, expected True or False"):
            read_flag(None, what="truncate")

    @pytest.mark.parametrize("given", ["no", 0, 1, 1.0, "", torch.tensor(True)])
    def test_what_counts_as_true_or_false_by_accident(self, given):
        with pytest.raises(InputError, match=r"prepend_bos is .*, expected True or False, or None"):
            read_prepend_bos(given)
        with pytest.raises(InputError, match=r"truncate is .*, expected True or False"):
            read_flag(given, what="truncate")
        with unchecked():
            for keyword in ("prepend_bos", "truncate", "return_attention_mask"):
                with pytest.raises(InputError, match=f"{keyword} is "):
                    to_tokens(PLAIN, "the", **{keyword: given})
            with pytest.raises(InputError, match="prepend_bos is "):
                to_str_tokens(PLAIN, [4], prepend_bos=given)
            with pytest.raises(InputError, match="prepend_bos is "):
                read_tokens([4], PLAIN, d_vocab=9, prepend_bos=given)
