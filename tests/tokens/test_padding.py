import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.tokens import infer_attention_mask, padding_token_id, to_tokens
from tests.tokens.tokenizers import (
    BYTES,
    BYTES_WITH_BOS,
    BYTES_WITH_EOS,
    NO_BOS,
    PAD_IS_EOS,
    PLAIN,
    WITH_BOS,
    WITH_BOTH,
    WITH_EOS,
    WORDS,
)


def infer_for(tokenizer, tokens, padding_side):
    return infer_attention_mask(
        tokens,
        pad_token_id=padding_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        padding_side=padding_side,
    )


class TestInferAttentionMask:
    @given(
        texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), min_size=1, max_size=5),
        tokenizer=st.sampled_from(
            [PLAIN, WITH_BOS, WITH_EOS, WITH_BOTH, PAD_IS_EOS, BYTES, BYTES_WITH_BOS, BYTES_WITH_EOS, NO_BOS]
        ),
        prepend_bos=st.sampled_from([None, True, False]),
        side=st.sampled_from(["left", "right"]),
        tell_side=st.booleans(),
    )
    @settings(deadline=None, max_examples=400)
    def test_gives_back_the_mask_that_to_tokens_made(self, texts, tokenizer, prepend_bos, side, tell_side):
        if tokenizer is NO_BOS and prepend_bos:
            prepend_bos = None
        try:
            batch = to_tokens(tokenizer, texts, prepend_bos=prepend_bos, padding_side=side)
        except InputError:  # an empty prompt without BOS
            return
        real = [row[mask.bool()] for row, mask in zip(*batch, strict=True)]
        pad = padding_token_id(tokenizer)
        # Not decidable, as documented: a prompt that is only the pad id, several times or with no side told.
        only_pad = [row for row in real if bool((row == pad).all())]
        if any(len(row) > 1 for row in only_pad) or (only_pad and not tell_side):
            return
        inferred = infer_for(tokenizer, batch.tokens, side if tell_side else None)
        expected = batch.attention_mask
        assert (torch.ones_like(expected) if inferred is None else inferred).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("tokens", "special", "side", "expected"),
        [
            # padding that means nothing else
            ([[9, 9, 5], [4, 5, 6]], (9, 1, 2), None, [[0, 0, 1], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 2), None, [[1, 0, 0], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 2), "left", None),
            ([[4, 9, 5], [4, 5, 6]], (9, 1, 2), None, None),
            ([[9, 9, 5]], (9, 1, 2), None, [[0, 0, 1]]),
            # padding is BOS: every row starts with it, so each keeps one ...
            ([[9, 9, 5], [9, 4, 5]], (9, 9, 2), None, [[0, 1, 1], [1, 1, 1]]),
            # ... some row does not, so no row was given a BOS
            ([[9, 9, 5], [4, 5, 6]], (9, 9, 2), None, [[0, 0, 1], [1, 1, 1]]),
            ([[9, 9, 5]], (9, 9, 2), None, None),
            ([[9, 9, 5]], (9, 9, 2), "left", None),
            # padding is EOS
            ([[5, 9, 9], [4, 5, 9]], (9, 1, 9), None, [[1, 1, 0], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 9), None, [[1, 0, 0], [1, 1, 1]]),
            ([[5, 9, 9]], (9, 1, 9), None, None),
            ([[9, 1, 5]], (9, 1, 9), None, [[0, 1, 1]]),
            # rows of nothing but the pad id
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), "left", [[0, 0, 1], [1, 1, 1]]),
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), "right", [[1, 0, 0], [1, 1, 1]]),
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), None, [[1, 0, 0], [1, 1, 1]]),
            ([[9, 9, 9], [9, 9, 5], [9, 4, 5]], (9, 9, 9), None, [[0, 0, 1], [0, 1, 1], [1, 1, 1]]),
            ([[9, 9]], (9, 9, 9), None, None),
            ([[9, 9], [4, 5]], (9, 1, 2), None, [[0, 0], [1, 1]]),
            # no pad id at all
            ([[0, 0, 5], [4, 5, 6]], (None, None, None), None, None),
        ],
    )
    def test_rule(self, tokens, special, side, expected):
        pad, bos, eos = special
        inferred = infer_attention_mask(
            torch.tensor(tokens), pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, padding_side=side
        )
        assert (None if inferred is None else inferred.tolist()) == expected

    def test_left_padded_rows_without_bos_lose_all_their_padding(self):
        """Keeping one pad id of each row as its BOS, where the two are one id, adds a token to such rows."""
        batch = to_tokens(BYTES, ["the cat sat on", "the"], padding_side="left")
        assert infer_for(BYTES, batch.tokens, "left").equal(batch.attention_mask)
