"""Tests of hooklens.model.loss against loops over rows and tokens."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.model.loss import next_token_loss
from tests.model.networks import make_model, pad_rows, random_tokens

D_VOCAB = 9
NOTHING = r"loss: rows of one token have no next token to predict; give at least two, or continue a cached prefix"


def loop(logits, tokens, mask, last_logits=None):
    """The loss of every token that is predicted, 0 for others, and which ones those are.

    Without `last_logits` entry `i` is the loss of token `i + 1`; with it, of token `i`.
    """
    batch, n = tokens.shape
    losses = torch.zeros(batch, n, dtype=logits.dtype)
    counted = torch.zeros(batch, n, dtype=torch.bool)
    for row in range(batch):
        # The latest token so far; padding is passed over.
        latest = None
        for pos in range(n):
            if not mask[row, pos]:
                continue
            if latest is not None:
                by = logits[row, latest]
            else:
                by = None if last_logits is None else last_logits[row % len(last_logits)]
            latest = pos
            if by is not None:
                losses[row, pos] = by.exp().sum().log() - by[tokens[row, pos]]
                counted[row, pos] = True
    return (losses, counted) if last_logits is not None else (losses[:, 1:], counted[:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_against_a_loop(dtype):
    """A float64 model's loss was rounded to float32."""
    logits = torch.randn(2, 4, 9).to(dtype)
    tokens = torch.randint(9, (2, 4))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    wide = logits if dtype == torch.float64 else logits.float()
    expected, pairs = torch.zeros(2, 3, dtype=wide.dtype), []
    for row in range(2):
        for pos in range(3):
            if mask[row, pos] and mask[row, pos + 1]:
                expected[row, pos] = -wide[row, pos].log_softmax(-1)[tokens[row, pos + 1]]
                pairs.append(expected[row, pos])
    found = next_token_loss(logits, tokens, mask.bool(), per_token=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(next_token_loss(logits, tokens, mask.bool()), torch.stack(pairs).mean())
    torch.testing.assert_close(next_token_loss(logits, tokens), next_token_loss(logits, tokens, per_token=True).mean())


@st.composite
def drawn_rows(draw):
    batch, n = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    # Padding on either side, on both, or between tokens; every row has a token.
    row = st.lists(st.booleans(), min_size=n, max_size=n).filter(any)
    mask = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = 3 * torch.randn(batch, n, D_VOCAB, generator=generator, dtype=torch.float64)
    tokens = torch.randint(D_VOCAB, (batch, n), generator=generator)
    return logits, tokens, mask, generator


@given(drawn_rows())
def test_any_padding(drawn):
    logits, tokens, mask, _ = drawn
    losses, counted = loop(logits, tokens, mask)
    if not counted.any():
        for per_token in (False, True):
            with pytest.raises(InputError, match=NOTHING):
                next_token_loss(logits, tokens, mask, per_token=per_token)
        return
    torch.testing.assert_close(next_token_loss(logits, tokens, mask, per_token=True), losses)
    torch.testing.assert_close(next_token_loss(logits, tokens, mask), losses[counted].mean())


@given(drawn=drawn_rows(), shared=st.booleans())
def test_any_padding_after_a_prefix(drawn, shared):
    logits, tokens, mask, generator = drawn
    rows = 1 if shared else len(tokens)
    last = 3 * torch.randn(rows, D_VOCAB, generator=generator, dtype=torch.float64)
    losses, counted = loop(logits, tokens, mask, last)
    found = next_token_loss(logits, tokens, mask, last_logits=last, per_token=True)
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(next_token_loss(logits, tokens, mask, last_logits=last), losses[counted].mean())


@given(drawn=drawn_rows(), with_prefix=st.booleans())
def test_no_mask_is_a_mask_of_ones(drawn, with_prefix):
    logits, tokens, mask, _ = drawn
    last = logits[:, 0].flip(-1) if with_prefix else None
    losses, counted = loop(logits, tokens, torch.ones_like(mask), last)
    assert counted.all()
    torch.testing.assert_close(next_token_loss(logits, tokens, last_logits=last, per_token=True), losses)
    torch.testing.assert_close(next_token_loss(logits, tokens, last_logits=last), losses.mean())


@given(drawn_rows())
def test_padding_makes_no_difference(drawn):
    """A row among padding has the losses that it has alone."""
    logits, tokens, mask, generator = drawn
    last = torch.randn(1, D_VOCAB, generator=generator, dtype=torch.float64)
    batched = next_token_loss(logits, tokens, mask, last_logits=last, per_token=True)
    for row, real in enumerate(mask):
        alone = next_token_loss(logits[row, real][None], tokens[row, real][None], last_logits=last, per_token=True)
        torch.testing.assert_close(batched[row, real], alone[0])
        assert batched[row, ~real].count_nonzero() == 0


@given(drawn=drawn_rows(), with_prefix=st.booleans())
def test_what_padding_holds_does_not_count(drawn, with_prefix):
    logits, tokens, mask, _ = drawn
    last = logits[:, 0].flip(-1) if with_prefix else None
    assume(with_prefix or loop(logits, tokens, mask)[1].any())
    others = torch.where(mask, tokens, (tokens + 1) % D_VOCAB)
    spoilt = logits.masked_fill(~mask[..., None], torch.inf)
    found, expected = (
        next_token_loss(*call, mask, last_logits=last, per_token=True) for call in ((spoilt, others), (logits, tokens))
    )
    assert torch.equal(found, expected)


def test_rows_of_one_token_have_nothing_to_predict():
    logits, tokens = torch.randn(2, 1, D_VOCAB), torch.randint(D_VOCAB, (2, 1))
    for per_token in (False, True):
        with pytest.raises(InputError, match=NOTHING):
            next_token_loss(logits, tokens, per_token=per_token)
    # A prefix predicts it.
    last = torch.randn(1, D_VOCAB)
    found = next_token_loss(logits, tokens, last_logits=last, per_token=True)
    torch.testing.assert_close(found, -last.log_softmax(-1)[0, tokens])
    with pytest.raises(InputError, match=NOTHING):
        make_model("rotary")(random_tokens(2, 1), return_type="loss")


def test_rows_whose_mask_leaves_one_token_are_refused_too():
    """The mean over no tokens was NaN."""
    logits, tokens = torch.randn(2, 3, D_VOCAB), torch.randint(D_VOCAB, (2, 3))
    mask = torch.tensor([[1, 0, 0], [0, 0, 1]]).bool()
    for per_token in (False, True):
        with pytest.raises(InputError, match=NOTHING):
            next_token_loss(logits, tokens, mask, per_token=per_token)
    with pytest.raises(InputError, match=NOTHING):
        make_model("rotary")(tokens, attention_mask=mask, return_type="loss")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n_prefix_rows", [1, 3])
def test_the_loss_on_a_cached_prefix_is_that_of_the_whole_rows(side, n_prefix_rows):
    """A left-padded suffix has its first token behind the padding; the prefix predicts it there."""
    model, prefix = make_model("rotary"), random_tokens(n_prefix_rows, 4, seed=7)
    suffixes = [random_tokens(1, n, seed=n)[0] for n in (3, 1, 5)]
    ids, mask = pad_rows(suffixes, side)
    kv = model.prefill(prefix)
    per_token = model(ids, attention_mask=mask, past_kv_cache=kv, return_type="loss", loss_per_token=True)
    assert per_token.shape == ids.shape
    whole = []
    for row, suffix in enumerate(suffixes):
        tokens = torch.cat([prefix[row % n_prefix_rows], suffix])[None]
        whole.append(model(tokens, return_type="loss", loss_per_token=True)[0, -len(suffix) :])
        # 1e-10: attention in two parts, another order of float64 sums.
        torch.testing.assert_close(per_token[row][mask[row].bool()], whole[row], rtol=1e-10, atol=1e-10)
        assert per_token[row][~mask[row].bool()].count_nonzero() == 0
    mean = model(ids, attention_mask=mask, past_kv_cache=kv, return_type="loss")
    torch.testing.assert_close(mean, torch.cat(whole).mean(), rtol=1e-10, atol=1e-10)
