"""The ids and the mask of a call."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hooklens.errors import InputError, UnknownTokenWarning
from hooklens.tokens import read_tokens, to_tokens
from tests.annotations import unchecked
from tests.tokens.tokenizers import ALL_SPECIAL, BOS_IS_EOS, PAD_IS_EOS, PLAIN, word_tokenizer
from tests.torch_version import traces_whole

_TRACED = """
import torch
from hooklens.tokens import read_tokens

class Special:
    def __init__(self, pad, eos):
        self.pad_token_id, self.bos_token_id, self.eos_token_id, self.unk_token_id = pad, None, eos, None

def tokens(ids, tokenizer):
    found = read_tokens(ids, tokenizer, d_vocab=9)
    mask = torch.ones_like(found.ids) if found.attention_mask is None else found.attention_mask
    return found.ids, mask

for tokenizer in (Special(0, 2), Special(2, 2), None):
    for ids in (torch.tensor([[0, 5, 0], [4, 5, 6]]), torch.tensor([4, 5, 6])):
        traced = torch.compile(lambda given: tokens(given, tokenizer), backend="eager", fullgraph=True)
        assert all(map(torch.equal, traced(ids), tokens(ids, tokenizer)))
        print("same")
"""


def with_added(**added):
    """A tokenizer with more tokens than its model has: ids from 9 on."""
    tokenizer = copy.deepcopy(word_tokenizer(**{**ALL_SPECIAL, "pad_token": "<pad>"}))
    tokenizer.add_special_tokens(added) if "pad_token" in added else tokenizer.add_tokens(added["tokens"])
    return tokenizer


class TestMask:
    def test_of_text_is_known_and_is_none_where_nothing_is_padded(self):
        assert read_tokens("the cat", PLAIN, d_vocab=9).attention_mask is None
        assert read_tokens(["the", "cat"], PLAIN, d_vocab=9).attention_mask is None
        ids, mask = read_tokens(["the cat", "cat"], PLAIN, d_vocab=9, padding_side="left")
        assert ids.tolist() == [[4, 5], [0, 5]]
        assert mask.tolist() == [[1, 1], [0, 1]]

    def test_of_ids(self):
        assert read_tokens([4, 5], PLAIN, d_vocab=9).attention_mask is None
        assert read_tokens([[0, 5], [4, 5]], PLAIN, d_vocab=9).attention_mask.tolist() == [[0, 1], [1, 1]]
        assert read_tokens([[0, 5], [4, 5]], BOS_IS_EOS, d_vocab=9).attention_mask is None
        assert read_tokens([[0, 5], [4, 5]], None, d_vocab=9).attention_mask is None

    @pytest.mark.parametrize("form", [torch.tensor, np.array, lambda mask: mask])
    def test_that_is_given_decides(self, form):
        ids = [[0, 5, 0], [4, 5, 6]]
        mask = [[1, 1, 1], [0, 1, 1]]
        assert read_tokens(ids, PLAIN, d_vocab=9, attention_mask=form(mask)).attention_mask.tolist() == mask
        assert read_tokens(ids, PLAIN, d_vocab=9, attention_mask=form([[1] * 3] * 2)).attention_mask is None
        assert read_tokens(ids[0], PLAIN, d_vocab=9, attention_mask=form([1, 1, 0])).attention_mask.tolist() == [
            [1, 1, 0]
        ]

    def test_of_another_shape_is_left_for_the_network_to_refuse(self):
        assert read_tokens([[4, 5]], PLAIN, d_vocab=9, attention_mask=torch.ones(3, 2)).attention_mask.shape == (3, 2)

    @pytest.mark.parametrize("mask", ["all", {1}, [[1], [1, 0]]])
    def test_that_is_none(self, mask):
        with pytest.raises(InputError, match=r"attention_mask is a .*; expected a tensor \[batch pos\] of 1"):
            read_tokens([[4, 5]], PLAIN, d_vocab=9, attention_mask=mask)

    def test_beside_text_may_hide_more_but_not_show_padding(self):
        texts = ["the cat", "cat"]
        hides_more = torch.tensor([[0, 1], [1, 0]])
        assert read_tokens(texts, PLAIN, d_vocab=9, attention_mask=hides_more).attention_mask is hides_more
        with pytest.raises(InputError, match="attention_mask counts padding of the texts as tokens; leave it out"):
            read_tokens(texts, PLAIN, d_vocab=9, attention_mask=torch.ones(2, 2))

    def test_side_is_checked_beside_ids_too(self):
        with unchecked(), pytest.raises(InputError, match="padding_side is 'up'; expected 'left' or 'right'"):
            read_tokens([4], PLAIN, d_vocab=9, padding_side="up")


class TestVocabulary:
    def test_text_with_tokens_that_the_model_lacks(self):
        """They ended in an IndexError of torch's embedding."""
        tokenizer = with_added(tokens=["<new>", "<other>"])
        text = r"the text holds tokens that the model lacks: '<new>' \(id 9\), '<other>' \(id 10\); it has d_vocab=9"
        with pytest.raises(InputError, match=text):
            read_tokens(["the <new>", "<other>"], tokenizer, d_vocab=9)
        with pytest.raises(InputError, match=text):
            to_tokens(tokenizer, ["the <new>", "<other>"], d_vocab=9)
        assert to_tokens(tokenizer, "the <new>").tolist() == [[4, 9]]

    def test_a_pad_token_that_the_model_lacks_fills(self):
        tokenizer = with_added(pad_token="<filling>")
        assert tokenizer.pad_token_id == 9
        ids, mask = to_tokens(tokenizer, ["the cat", "cat"], d_vocab=9, return_attention_mask=True)
        assert ids.tolist() == [[4, 5], [5, 9]]
        expected = [[4, 5], [5, 0]]
        for found in (
            read_tokens(["the cat", "cat"], tokenizer, d_vocab=9),
            read_tokens(ids, tokenizer, d_vocab=9),
            read_tokens(ids, tokenizer, d_vocab=9, attention_mask=mask),
        ):
            assert found.ids.tolist() == expected
            assert found.attention_mask.tolist() == [[1, 1], [1, 0]]
        assert ids.tolist() == [[4, 5], [5, 9]]

    def test_a_pad_token_that_the_model_has_stays(self):
        assert read_tokens(["the cat", "the"], PAD_IS_EOS, d_vocab=9).ids.tolist() == [[1, 4, 5, 2], [1, 4, 2, 2]]

    def test_a_pad_token_that_the_model_lacks_is_no_token(self):
        tokenizer = with_added(pad_token="<filling>")
        for mask in (None, torch.ones(1, 3)):
            with pytest.raises(InputError, match=r"token ids outside the vocabulary: 9 \(row 0, position 1\)"):
                read_tokens([4, 9, 5], tokenizer, d_vocab=9, attention_mask=mask)

    def test_ids_outside(self):
        with pytest.raises(InputError, match=r"9 \(row 0, position 1\), -1 \(row 1, position 0\); .* d_vocab=9"):
            read_tokens([[4, 9], [-1, 4]], PLAIN, d_vocab=9)


class TestUnknownWords:
    def test_one_warning_a_call_names_them(self):
        with pytest.warns(UnknownTokenWarning) as record:
            ids = read_tokens(["the zebra sat", "lion the zebra"], PLAIN, d_vocab=9).ids
        assert ids.tolist() == [[4, 3, 6], [3, 4, 3]]
        assert [str(warning.message) for warning in record] == [
            "the tokenizer's vocabulary lacks 'zebra', 'lion': in the place of each stands the unknown token '<unk>' "
            "(id 3), so the model cannot tell them apart; use words that it has"
        ]
        assert record[0].filename == __file__

    def test_text_without_a_tokenizer(self):
        with pytest.raises(InputError, match="text was given, but the model has no tokenizer; pass token ids"):
            read_tokens("the", None, d_vocab=9)


class TestWithoutLooking:
    def test_ids_without_values_are_checked_for_their_form_alone(self):
        ids = torch.zeros(2, 3, dtype=torch.int32, device="meta")
        found = read_tokens(ids, PLAIN, d_vocab=9)
        assert found.ids.dtype == torch.int64
        assert found.attention_mask is None
        with pytest.raises(InputError, match=r"dtype torch\.float32"):
            read_tokens(ids.float(), PLAIN, d_vocab=9)

    @traces_whole
    def test_a_traced_call_gives_the_same_ids_and_mask_without_a_break(self):
        """`fullgraph` refuses every look at a value; another process has no shape checks, which cannot be traced."""
        done = subprocess.run(
            [sys.executable, "-c", _TRACED], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
        )
        assert (done.returncode, done.stdout) == (0, "same\n" * 6), done.stderr

    def test_ids_are_looked_at_once(self, monkeypatch):
        """Each look at an accelerator's values waits for it; copying them once does."""
        copies = []
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self) or self)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_tokens(torch.tensor([[4, 5], [0, 5]]), PLAIN, d_vocab=9)
        assert len(copies) == 1
