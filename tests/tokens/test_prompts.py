import pytest
import torch

from hooklens.errors import InputError
from hooklens.tokens import check_same_tokens, read_prompts
from tests.tokens.kinds import make_tokenizer

TEXTS = ["the cat sat", "the mat"]


def test_rows_are_the_real_tokens_of_text_and_of_padded_ids():
    tokenizer = make_tokenizer("byte-level BPE", "BOS")
    options = {"d_vocab": len(tokenizer), "n_ctx": 64}
    rows = read_prompts(TEXTS, tokenizer, **options)
    assert [row.tolist() for row in rows] == [tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=7) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones(len(row)), (width - len(row), 0)) for row in rows])
    again = read_prompts(ids, tokenizer, attention_mask=mask, **options)
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def test_masks_that_do_not_fit_are_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    options = {"d_vocab": 9, "n_ctx": 64}
    with pytest.raises(InputError, match=r"shape \[2, 2\]; expected that of the ids, \[2, 3\]"):
        read_prompts(ids, None, attention_mask=torch.ones(2, 2), **options)
    with pytest.raises(InputError, match=r"hides every token of rows \[1\]"):
        read_prompts(ids, None, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), **options)
    with pytest.raises(InputError, match="goes with token ids"):
        read_prompts(TEXTS, make_tokenizer("byte-level BPE", "none"), attention_mask=torch.ones(2, 3), **options)


def test_ids_that_mean_other_tokens_are_named():
    one, other = make_tokenizer("byte-level BPE", "none"), make_tokenizer("Metaspace always", "none")
    check_same_tokens(one, make_tokenizer("byte-level BPE", "BOS"), range(1000), whose=("a", "b"))
    # Special tokens are the same in both; an id that neither has is nobody's.
    check_same_tokens(one, other, [0, 1, 10**6], whose=("a", "b"))
    with pytest.raises(InputError, match=rf"id {len(one) - 1} is '.*' and None"):
        check_same_tokens(one, other, [len(one) - 1], whose=("a", "b"))
    with pytest.raises(InputError, match=r"the tokenizers of a and b differ: id 9 is '.*' and '.*'; take models"):
        check_same_tokens(one, other, [0, 9], whose=("a", "b"))
