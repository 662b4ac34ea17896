"""Rows as they are split, drawn, encoded and run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.analysis.lens.rows import draw_batches, encode, run_rows, split_rows
from hooklens.errors import InputError
from tests.model.networks import make_model, random_tokens
from tests.word_models import make_word_model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30)
@given(n=st.integers(2, 40), held_out=st.floats(0.01, 0.99), seed=st.integers(0, 3))
def test_rows_are_on_one_side_each(n, held_out, seed):
    rows, held = split_rows(n, held_out, seeded(seed))
    assert sorted([*rows, *held]) == list(range(n))
    assert rows
    assert held
    assert abs(len(held) - held_out * n) <= 1


@settings(max_examples=30)
@given(n=st.integers(1, 12), batch_size=st.integers(1, 15), n_batches=st.integers(1, 9))
def test_each_row_comes_once_before_any_comes_again(n, batch_size, n_batches):
    rows = list(range(100, 100 + n))
    drawn = list(draw_batches(rows, batch_size, n_batches, seeded()))
    assert [len(batch) for batch in drawn] == [min(batch_size, n)] * n_batches
    order = [row for batch in drawn for row in batch]
    for start in range(0, len(order) - n + 1, n):
        assert sorted(order[start : start + n]) == rows


def test_one_row_is_too_few():
    with pytest.raises(InputError, match="data has 1 row"):
        split_rows(1, 0.5, seeded())


def test_padding_is_left_out_and_long_texts_are_cut():
    model = make_word_model(d_model=8, n_ctx=6, init_std=0.2)
    texts = ["Mary gave", "Mary and John went to the store and", "a"]
    ids, real = encode(model, texts, [0, 1])
    assert ids.shape == (2, 6)
    lengths = [len(model.to_tokens(text)[0]) for text in texts[:2]]
    assert real.sum(1).tolist() == lengths
    found = run_rows(model, texts, [0, 1], [1])
    assert len(found.final) == sum(lengths) == len(found.entering[1]) == len(found.following)
    alone = run_rows(model, texts, [0], [1])
    # Float32: rows in a batch and by themselves.
    torch.testing.assert_close(found.entering[1][: lengths[0]], alone.entering[1], rtol=1e-5, atol=1e-6)
    tokens = model.to_tokens(texts[0])[0]
    assert found.following[: lengths[0]].tolist() == [*tokens[1:].tolist(), -1]


def test_streams_are_those_of_the_model():
    model = make_model("grouped")
    tokens = random_tokens(2, 4)
    found = run_rows(model, tokens, [1, 0], [0, 1])
    _, cache = model.run_with_cache(tokens[[1, 0]])
    for layer in (0, 1):
        assert torch.equal(found.entering[layer], cache["resid_pre", layer].flatten(0, 1))
    assert torch.equal(found.final, cache["resid_post", 1].flatten(0, 1))
    assert not found.final.requires_grad
