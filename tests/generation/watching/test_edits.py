"""Edits while generating, against full reruns with the same edits and against plain loops."""

import pytest
import torch

from hooklens import edits
from hooklens.errors import EditError, HookNameError
from tests.annotations import unchecked
from tests.generation.networks import RAGGED, left_pad, pair, with_padding_id

N_NEW = 6
VECTOR = torch.linspace(-2, 2, 32)


def generate(model, prompts, edit_list, **keywords):
    keywords = {"do_sample": False, "max_new_tokens": N_NEW, "return_type": "output", "verbose": False, **keywords}
    ids = prompts if isinstance(prompts, torch.Tensor) else left_pad(prompts)[0]
    return model.generate(ids, edits=edit_list, **keywords)


def edited_loop(model, prompt, edit_list, n=N_NEW):
    """Most likely tokens by one full forward with the edits for each."""
    row = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([row]), edits=edit_list)
        row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "edit",
    [
        edits.Add("blocks.1.hook_resid_pre", VECTOR),
        edits.Add("blocks.1.hook_resid_pre", VECTOR, pos=[1, 7]),
        edits.Scale("blocks.*.hook_attn_out", 0.3, pos=slice(2, 9)),
        edits.Zero("blocks.0.attn.hook_z", head=[1, 3]),
        edits.Project("hook_embed", VECTOR),
        edits.Custom("blocks.0.mlp.hook_post", lambda region: region.relu()),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_edits_act_at_every_step_with_absolute_positions(edit, use_cache):
    model, _ = pair()
    # A full forward checks positions against the tokens there are so far; the prompt is long enough for all but 7.
    expected = [
        edited_loop(model, prompt, [edit] if edit.pos != [1, 7] else [], n=N_NEW if edit.pos != [1, 7] else 0)
        for prompt in RAGGED
    ]
    out = generate(with_padding_id(model), RAGGED, [edit], use_past_kv_cache=use_cache)
    if edit.pos == [1, 7]:
        rerun_equals_generation(model, out, [edit])
    else:
        assert [row.tolist() for row in out.new_tokens] == expected
    plain = generate(with_padding_id(model), RAGGED, [])
    assert out.tokens.tolist() != plain.tokens.tolist()


def rerun_equals_generation(model, out, edit_list):
    """The new tokens are the most likely ones of one forward of each row with the edits."""
    for row, n_prompt, n_new in zip(out.tokens, out.prompt_lengths, out.n_new_tokens, strict=True):
        with torch.no_grad():
            logits = model.run_with_hooks(row[None, : n_prompt + n_new - 1], edits=edit_list)
        new = row[n_prompt : n_prompt + n_new]
        assert logits[0, n_prompt - 1 :].argmax(-1).tolist() == new.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pos", [-1, [-1, -3], slice(-2, None), slice(None, -1)], ids=str)
def test_negative_positions_count_from_the_end_of_the_prompt(pos, use_cache):
    model, _ = pair()
    name = "blocks.1.hook_resid_pre"
    out = generate(with_padding_id(model), RAGGED, [edits.Add(name, VECTOR, pos=pos)], use_past_kv_cache=use_cache)
    for prompt, new in zip(RAGGED, out.new_tokens, strict=True):
        n = len(prompt)
        if isinstance(pos, slice):
            start, stop = (None if end is None else end + n for end in (pos.start, pos.stop))
            absolute = slice(start, stop)
        else:
            absolute = [p + n for p in ([pos] if isinstance(pos, int) else pos)]
        assert new.tolist() == edited_loop(model, prompt, [edits.Add(name, VECTOR, pos=absolute)])


@pytest.mark.parametrize("use_cache", [True, False])
def test_when_keeps_an_edit_to_the_prompt_or_to_new_tokens(use_cache):
    model, _ = pair()
    name, n = "blocks.1.hook_resid_pre", 6
    prompt = torch.tensor([RAGGED[0]])
    keywords = {"use_past_kv_cache": use_cache}
    on_prompt = generate(model, prompt, [edits.Add(name, VECTOR, when="prefill")], **keywords)
    same = edited_loop(model, RAGGED[0], [edits.Add(name, VECTOR, pos=slice(0, n))])
    assert on_prompt.new_tokens[0].tolist() == same
    on_new = generate(model, prompt, [edits.Add(name, VECTOR, when="decode")], **keywords)
    same = edited_loop(model, RAGGED[0], [edits.Add(name, VECTOR, pos=slice(n, None))])
    assert on_new.new_tokens[0].tolist() == same
    assert on_prompt.new_tokens[0].tolist() != on_new.new_tokens[0].tolist()


PER_ROW = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    "edit",
    [
        edits.Add("blocks.1.hook_resid_pre", VECTOR, rows=[2]),
        edits.Add("blocks.1.hook_resid_pre", PER_ROW[:, 0], pos=2),
        edits.Add("blocks.1.hook_resid_pre", PER_ROW, when="decode"),
    ],
    ids=["rows", "value-per-row-at-a-position", "value-per-row"],
)
def test_rows_are_prompts_also_when_other_rows_have_ended(edit):
    """With rows taken from the batch as they end, row 2 of an edit must stay prompt 2."""
    model, _ = pair()
    padded = with_padding_id(model)
    full = generate(padded, RAGGED, [edit])
    # A token by which row 0 ends before the others do.
    new = [row.tolist() for row in full.new_tokens]
    end = next(token for token in new[0][:3] if token not in new[1] + new[2])
    ended = generate(padded, RAGGED, [edit], eos_token_id=end)
    assert ended.n_new_tokens[0] < N_NEW
    assert [row.tolist() for row in ended.new_tokens[1:]] == new[1:]
    assert full.tokens.tolist() != generate(padded, RAGGED, []).tokens.tolist()


def test_all_samples_of_a_prompt_get_its_edits():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80], [61, 2, 33]])
    edit = edits.Add("blocks.1.hook_resid_pre", VECTOR * 4, rows=[1])
    keywords = {"do_sample": True, "seed": 0, "num_return_sequences": 2}
    both = generate(model, ids, [edit], **keywords)
    plain = generate(model, ids, [], **keywords)
    everywhere = generate(model, ids, [edits.Add("blocks.1.hook_resid_pre", VECTOR * 4)], **keywords)
    assert both.tokens[:2].tolist() == plain.tokens[:2].tolist()
    assert both.tokens[2:].tolist() == everywhere.tokens[2:].tolist()
    assert plain.tokens[2:].tolist() != everywhere.tokens[2:].tolist()


def test_a_mean_leaves_out_padding_and_ended_rows():
    model, _ = pair()
    rows = [[5, 17, 80], [61, 2]]
    out = generate(with_padding_id(model), rows, [edits.Mean("hook_embed")], max_new_tokens=1)
    with torch.no_grad():
        mean = model.embed.W_E[[5, 17, 80, 61, 2]].mean(0)
    same = generate(with_padding_id(model), rows, [edits.Replace("hook_embed", mean)], max_new_tokens=1)
    torch.testing.assert_close(out.logprobs, same.logprobs)


def test_positions_after_a_cache_are_absolute():
    model, _ = pair()
    name = "blocks.1.hook_resid_pre"
    prefix, suffix = [5, 17, 80], [3, 44]
    kv = model.prefill(torch.tensor([prefix]))
    for pos in (4, -1):
        out = generate(model, torch.tensor([suffix]), [edits.Add(name, VECTOR, pos=pos)], past_kv_cache=kv)
        assert out.new_tokens[0].tolist() == edited_loop(model, prefix + suffix, [edits.Add(name, VECTOR, pos=4)])


def test_hooks_from_outside_keep_their_rows_and_edit_every_step():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80], [61, 2, 33]])
    sizes = []

    def steer_last_row(tensor, hook):
        sizes.append(len(tensor))
        tensor[1] += VECTOR

    keywords = {"do_sample": False, "max_new_tokens": N_NEW, "return_type": "output", "verbose": False}
    with model.hooks([("blocks.1.hook_resid_pre", steer_last_row)]):
        full = model.generate(ids, **keywords)
        end = next(token for token in full.new_tokens[0].tolist() if token not in full.new_tokens[1])
        ended = model.generate(ids, eos_token_id=end, **keywords)
    assert set(sizes) == {2}
    assert ended.new_tokens[1].tolist() == full.new_tokens[1].tolist()
    expected = edited_loop(model, [61, 2, 33], [edits.Add("blocks.1.hook_resid_pre", VECTOR)])
    assert full.new_tokens[1].tolist() == expected


def test_an_edit_of_the_logits_decides_the_tokens():
    model, _ = pair()
    push = torch.zeros(97)
    push[42] = 1e4
    ids = torch.tensor([[5, 17, 80]])
    for edit in (edits.Add("unembed.hook_out", push), edits.Add("unembed.hook_out", push, pos=slice(2, None))):
        assert generate(model, ids, [edit]).new_tokens[0].tolist() == [42] * N_NEW


def test_what_does_not_exist_is_refused_before_any_work():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80], [61, 2, 33]])
    with pytest.raises(EditError, match=r"positions out of range: 9 in row 0, -4 in row 0, 9 in row 1, -4 in row 1"):
        generate(model, ids, [edits.Zero("hook_embed", pos=[2, 8, 9, -4])])
    with pytest.raises(EditError, match=r"rows: \[2\] out of range; there are 2 prompts, which rows"):
        generate(model, ids, [edits.Zero("hook_embed", rows=[1, 2])], num_return_sequences=1)
    with pytest.raises(HookNameError, match="hook_embedd"):
        generate(model, ids, [edits.Zero("hook_embedd")])
    with unchecked(), pytest.raises(Exception, match=r"expected values from hooklens\.edits"):
        generate(model, ids, ["hook_embed"])


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_k", "blocks.0.attn.hook_v"])
def test_what_single_query_heads_read_is_edited_without_a_cache(name):
    model, _ = pair()
    edit = edits.Scale(name, -2.0, query_head=1)
    out = generate(with_padding_id(model), RAGGED, [edit], use_past_kv_cache=False)
    assert [row.tolist() for row in out.new_tokens] == [edited_loop(model, prompt, [edit]) for prompt in RAGGED]
    assert out.tokens.tolist() != generate(with_padding_id(model), RAGGED, []).tokens.tolist()
    by_prompt = edits.Scale(name, -2.0, query_head=1, rows=0, when="decode")
    assert (
        generate(with_padding_id(model), RAGGED, [by_prompt], use_past_kv_cache=False).tokens.shape == out.tokens.shape
    )


def test_what_single_query_heads_read_is_in_no_cache():
    model, _ = pair()
    text = (
        r"edits at 'blocks.0.attn.hook_k_per_head', 'blocks.1.attn.hook_v_per_head' change what single query heads read"
        r".* use_past_kv_cache=False, or edit the key-value head with head= at hook_k or hook_v"
    )
    chosen = [edits.Zero("k0", query_head=0), edits.Zero("z", query_head=1), edits.Zero("v_per_head1", when="decode")]
    with pytest.raises(EditError, match=text):
        generate(model, torch.tensor([RAGGED[0]]), chosen)
