"""Tests of hooklens.evaluation.continuations: the table of scores, against each full sequence run alone."""

import math

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.errors import EditError, InputError
from hooklens.evaluation import score_continuations
from tests.evaluation.networks import N_CTX, PREFIX, draw_row, reader, score_alone
from tests.model.networks import make_model

TEXTS = [" John gave a drink to", " Mary", " Mary wanted to give the book to", " John said goodbye to", " Mary"]


def test_texts_score_as_their_full_sequences_alone():
    model = reader()
    table = score_continuations(model, PREFIX, TEXTS, progress=False)
    assert table["index"].tolist() == list(range(5))
    assert table["continuation"].tolist() == TEXTS
    prefix = model.to_tokens(PREFIX)[0].tolist()
    for _, row in table.iterrows():
        whole = model.to_tokens(PREFIX + row["continuation"])[0].tolist()
        assert prefix + row["tokens"] == whole
        expected = score_alone(model, prefix, row["tokens"])
        assert row["token_logprobs"] == pytest.approx(expected, abs=1e-10)
        assert row["logprob"] == pytest.approx(math.fsum(expected), abs=1e-10)
        assert row["n_tokens"] == len(expected)
        assert row["n_bytes"] == len(row["continuation"].encode())
        assert row["logprob_per_token"] == row["logprob"] / row["n_tokens"]
        assert row["logprob_per_byte"] == row["logprob"] / row["n_bytes"]


@pytest.mark.parametrize("batch_size", [1, 2, 100, "auto"])
def test_batches_change_neither_numbers_nor_order(batch_size):
    model = reader()
    prefix = draw_row(6, seed=0)
    rows = [draw_row(n, seed=n) for n in (1, 4, 2, 7, 1, 3)]
    table = score_continuations(model, prefix, rows, batch_size=batch_size, progress=False)
    assert table["tokens"].tolist() == rows
    for row, found in zip(rows, table["token_logprobs"], strict=True):
        assert found == pytest.approx(score_alone(model, prefix, row), abs=1e-10)


def test_greedy_continuations_are_told():
    model = reader()
    prefix = draw_row(6, seed=0)
    greedy = list(prefix)
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]), attention_mask=torch.ones(1, len(greedy)))[0, -1].argmax()))
    best = greedy[6:]
    other = [*best[:2], (best[2] + 1) % 20]
    table = score_continuations(model, prefix, [best, other, best[:1]], progress=False)
    assert table["is_greedy"].tolist() == [True, False, True]


def test_model_without_tokenizer_scores_ids():
    model = make_model("alibi")
    prefix, rows = draw_row(5, seed=1), [draw_row(3, seed=2), draw_row(1, seed=3)]
    table = score_continuations(model, torch.tensor(prefix), [torch.tensor(rows[0]), rows[1]], progress=False)
    assert table["continuation"].tolist() == [None, None]
    assert table["logprob_per_byte"].isna().all()
    for row, found in zip(rows, table["token_logprobs"], strict=True):
        assert found == pytest.approx(score_alone(model, prefix, row), abs=1e-10)
    with pytest.raises(InputError, match="continuation 0: text was given, but the model has no tokenizer"):
        score_continuations(model, prefix, [" Mary"], progress=False)


VECTOR = torch.linspace(-1, 1, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "edit",
    [
        edits.Scale("blocks.0.hook_resid_mid", 0.5),
        edits.Add("blocks.1.hook_resid_pre", VECTOR),
        edits.Project("blocks.*.hook_resid_post", VECTOR),
        edits.Zero("blocks.0.attn.hook_z", head=1, pos=2),
        edits.Add("blocks.0.hook_resid_pre", VECTOR, pos=7),
        # These act on several tokens at once, and run each sequence whole.
        edits.Zero("blocks.0.attn.hook_pattern", head=0),
        edits.Scale("blocks.0.attn.hook_attn_scores", 0.5),
        edits.Add("blocks.0.hook_resid_pre", VECTOR, pos=-2),
        edits.Zero("blocks.0.hook_mlp_out", pos=[1, 7]),
        edits.Scale("blocks.0.hook_resid_pre", 2.0, pos=slice(3, None)),
        edits.Zero("blocks.*.attn.hook_[kv]", query_head=1),
        edits.Mean("blocks.1.hook_resid_pre"),
        edits.Custom("blocks.0.hook_resid_pre", lambda region: region.flip(1)),
    ],
    ids=lambda edit: f"{type(edit).__name__} {edit.pos}",
)
def test_edits_act_as_on_the_full_sequence(edit):
    """An edit from the end, or over several tokens, sees the whole sequence and no prefix's end or batch's rows."""
    model = reader()
    prefix = draw_row(6, seed=0)
    rows = [draw_row(n, seed=n) for n in (3, 5, 4)]
    table = score_continuations(model, prefix, rows, edits=[edit], progress=False)
    plain = score_continuations(model, prefix, rows, progress=False)
    for row, found, unedited in zip(rows, table["token_logprobs"], plain["token_logprobs"], strict=True):
        expected = score_alone(model, prefix, row, [edit])
        assert found == pytest.approx(expected, abs=1e-10)
        assert found != pytest.approx(unedited, abs=1e-6)


def test_edit_at_a_token_that_a_row_lacks_is_refused_as_on_the_full_sequence():
    model = reader()
    rows = [draw_row(3, seed=1), draw_row(1, seed=2)]
    edit = edits.Zero("hook_embed", pos=8)
    table = score_continuations(model, draw_row(6, seed=0), rows[:1], edits=[edit], progress=False)
    assert table["token_logprobs"][0] == pytest.approx(score_alone(model, draw_row(6, seed=0), rows[0]), abs=1e-10)
    with pytest.raises(EditError, match="position 8 is outside row 0, which has 7 tokens"):
        score_continuations(model, draw_row(6, seed=0), rows, edits=[edit], progress=False)


def test_bad_input_is_refused_all_at_once():
    model = reader()
    prefix = draw_row(6, seed=0)
    with pytest.raises(InputError, match=r"(?s)continuation 1: '' has no token.*continuation 2: \[\] has no token"):
        score_continuations(model, prefix, [" Mary", "", []], progress=False)
    with pytest.raises(InputError, match="there is no continuation to score"):
        score_continuations(model, prefix, [], progress=False)
    with pytest.raises(InputError, match="one string; give a list"):
        score_continuations(model, prefix, " Mary", progress=False)
    with pytest.raises(
        InputError,
        match=r"continuation 0: token ids outside the vocabulary: -1 \(row 0, position 1\), 9999 \(row 0, position 2\)",
    ):
        score_continuations(model, prefix, [[1, -1, 9999]], progress=False)
    with pytest.raises(InputError, match="batch_size is 0; expected 'auto' or an integer >= 1"):
        score_continuations(model, prefix, [" Mary"], batch_size=0, progress=False)
    too_long = N_CTX - 6 + 1
    text = rf"continuations 1 \({too_long} tokens\) do not fit behind a prefix of 6 tokens: the model has n_ctx={N_CTX}"
    with pytest.raises(InputError, match=text):
        score_continuations(model, prefix, [[4], [4] * too_long], progress=False)
    with pytest.raises(InputError, match=r"edits Scale\('hook_embed'\) name rows.*leave rows out"):
        score_continuations(model, prefix, [[4]], edits=[edits.Scale("hook_embed", 2.0, rows=0)], progress=False)


def test_sequence_may_fill_the_context():
    model = reader()
    prefix, row = draw_row(6, seed=0), draw_row(N_CTX - 6, seed=1)
    table = score_continuations(model, prefix, [row], progress=False)
    assert table["token_logprobs"][0] == pytest.approx(score_alone(model, prefix, row), abs=1e-10)


def test_ids_that_the_tokenizer_lacks_have_no_text():
    """Embeddings often have more rows than the tokenizer has tokens."""
    model = reader()
    model = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg, tokenizer=FewTokens(model.tokenizer))
    table = score_continuations(model, draw_row(4, seed=0), [[4], [100]], progress=False)
    assert table["continuation"].isna().tolist() == [False, True]


class FewTokens:
    """A tokenizer that has the first 50 ids of another one."""

    bos_token_id = eos_token_id = pad_token_id = unk_token_id = None

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, **options):
        return self.inner(text, **options)

    def __len__(self):
        return 50

    def decode(self, token_ids, **options):
        return self.inner.decode(token_ids, **options)
