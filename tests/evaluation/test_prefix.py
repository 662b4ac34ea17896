"""Tests of hooklens.evaluation.prefix: encoding, extending, and which edits may act on parts."""

import pytest
import torch

from hooklens import edits
from hooklens.errors import InputError
from hooklens.evaluation.prefix import edits_act_in_parts, encode_continuations, extend_prefix, make_prefix, run_behind
from tests.annotations import unchecked
from tests.evaluation.networks import PREFIX, reader


def test_prefix_follows_the_bos_rule_and_continuations_have_none():
    model = reader()
    assert torch.equal(make_prefix(model, PREFIX).tokens, model.to_tokens(PREFIX))
    without = make_prefix(model, PREFIX, prepend_bos=False).tokens
    assert torch.equal(without, model.to_tokens(PREFIX, prepend_bos=False))
    _, rows = encode_continuations(model, make_prefix(model, "Mary"), [" " + PREFIX])
    assert rows == [without[0].tolist()]


@pytest.mark.parametrize("edit", [None, edits.Scale("hook_embed", 2.0, pos=8), edits.Mean("blocks.0.hook_mlp_out")])
def test_extended_prefix_is_the_prefix_of_the_whole(edit):
    model = reader()
    given = [] if edit is None else [edit]
    prefix = make_prefix(model, PREFIX, edits=given)
    extended = run_behind(model, prefix, extend_prefix(model, prefix, " John gave"))
    whole = make_prefix(model, PREFIX + " John gave", edits=given)
    assert torch.equal(extended.tokens, whole.tokens)
    assert (extended.cache is None) == (whole.cache is None)
    if whole.cache is not None:
        assert extended.cache.frozen
        torch.testing.assert_close(extended.cache.last_logits, whole.cache.last_logits, rtol=0, atol=1e-10)
        for found, expected in zip(extended.cache.entries, whole.cache.entries, strict=True):
            torch.testing.assert_close(found.past_keys, expected.past_keys, rtol=0, atol=1e-10)


def test_extending_leaves_the_prefix_as_it_was():
    model = reader()
    prefix = make_prefix(model, PREFIX)
    before = prefix.cache.entries[1].past_values.clone()
    run_behind(model, prefix, extend_prefix(model, prefix, " John gave"))
    assert torch.equal(prefix.cache.entries[1].past_values, before)
    assert prefix.cache.frozen


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edits.Zero("hook_embed"), True),
        (edits.Zero("hook_embed", pos=3), True),
        (edits.Zero("hook_embed", pos=-1), False),
        (edits.Zero("hook_embed", pos=[0]), False),
        (edits.Zero("hook_embed", pos=slice(2)), False),
        (edits.Zero("blocks.0.attn.hook_pattern"), False),
        (edits.Zero("blocks.*"), False),
        (edits.Zero("unembed.hook_in"), True),
        (edits.Zero("unembed.hook_in", pos=1), False),
        (edits.Replace("hook_embed", torch.zeros(16)), True),
        (edits.Replace("hook_embed", torch.zeros(5, 16)), False),
        (edits.Zero("blocks.0.attn.hook_k", head=1), True),
        (edits.Zero("blocks.0.attn.hook_k", query_head=1), False),
        (edits.Zero("v_per_head"), False),
        (edits.Zero("blocks.0.attn.hook_q", query_head=1), True),
        (edits.Mean("hook_embed"), False),
        (edits.Custom("hook_embed", torch.neg), False),
    ],
)
def test_which_edits_act_in_parts(edit, expected):
    assert edits_act_in_parts(reader(), [edit]) is expected


def test_padding_of_ids_is_no_part_of_prefix_or_continuation():
    """A call hid it, and an evaluation ran it as tokens."""
    model = reader()
    pad = model.tokenizer.pad_token_id
    assert make_prefix(model, [pad, pad, 5, 6, pad]).tokens.tolist() == [[5, 6]]
    _, rows = encode_continuations(model, make_prefix(model, [5]), [[5, pad, 6, pad]])
    assert rows == [[5, pad, 6]]


def test_bad_prefixes_are_refused():
    model = reader()
    with pytest.raises(InputError, match=r"the prefix has shape \[2, 3\]; expected one row of at least one token"):
        make_prefix(model, torch.full((2, 3), 4))
    with pytest.raises(InputError, match=r"no prompt was given: the prefix is empty \(\[\]\)"):
        make_prefix(model, [])
    with pytest.raises(InputError, match="the input needs 49 positions, the model has n_ctx=48"):
        make_prefix(model, [4] * 49)
    prefix = make_prefix(model, [4])
    with pytest.raises(InputError, match=r"a continuation has shape \[2, 2\]; expected one row of at least one token"):
        encode_continuations(model, prefix, [torch.full((2, 2), 4)])
    text = "a continuation is a list of texts; expected a text or one row of token ids"
    with unchecked(), pytest.raises(InputError, match=text):
        encode_continuations(model, prefix, [[" Mary", " John"]])
