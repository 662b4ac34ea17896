"""Head scores against loops over positions, and on heads that are made to be what they are called."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens import HookedCausalLM
from hooklens.analysis.heads import (
    detect_heads,
    duplicate_token_target,
    head_scores,
    induction_target,
    previous_token_target,
    repeated_random_tokens,
    score_heads,
)
from hooklens.config import AlibiPositions
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_targets_are_what_their_sentences_say(ids):
    tokens = torch.tensor([ids])
    n = len(ids)
    pairs = [(query, key) for query in range(n) for key in range(n)]
    for target, holds in (
        (previous_token_target, lambda query, key: key == query - 1),
        (duplicate_token_target, lambda query, key: key < query and ids[key] == ids[query]),
        (induction_target, lambda query, key: 0 < key < query and ids[key - 1] == ids[query]),
    ):
        found = target(tokens)[0]
        assert [bool(found[pair]) for pair in pairs] == [holds(*pair) for pair in pairs]


@pytest.mark.parametrize("network", ["rotary", "capped", "alibi, grouped"])
def test_scores_are_mean_attention_to_the_target(network):
    model = make_model(network)
    tokens = random_tokens(2, 7, d_vocab=4)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(tokens, names_filter="pattern", attention_mask=mask)
    target = induction_target(tokens)
    scores = score_heads(model, tokens, target, attention_mask=mask)
    for layer in range(2):
        for head in range(4):
            shares = []
            for row, first in ((0, 0), (1, 2)):
                for query in range(first, 7):
                    keys = [key for key in range(first, 7) if target[row, query, key]]
                    if keys:
                        shares.append(float(cache["pattern", layer][row, head, query, keys].sum()))
            assert float(scores[layer, head]) == pytest.approx(sum(shares) / len(shares))


def test_a_previous_token_head_is_found():
    """ALiBi's first head, with a steep slope on keys alone and itself masked by a window, cannot but look back."""
    model = make_model(make_config(n_layers=1, positions=AlibiPositions()))
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
        model.blocks[0].attn.b_Q.zero_()
    tokens = random_tokens(2, 12)
    _, cache = model.run_with_cache(tokens, names_filter="pattern")
    table = detect_heads(model, tokens, "previous_token")
    slopes_order = cache["pattern", 0].diagonal(-1, 2, 3).mean((0, 2)).argsort(descending=True).tolist()
    assert table["head"].tolist() == slopes_order
    best = float(table["score"].iloc[0])
    assert detect_heads(model, tokens, "previous_token", min_score=best).index.tolist() == [table.index[0]]
    assert detect_heads(model, tokens, "previous_token", min_score=1.0).empty


def test_any_target():
    model = make_model("rotary")
    tokens = random_tokens(2, 6)
    first_key = torch.zeros(6, 6, dtype=torch.bool)
    first_key[1:, 0] = True
    _, cache = model.run_with_cache(tokens, names_filter="pattern")
    table = detect_heads(model, tokens, first_key)
    expected = torch.stack([cache["pattern", layer][:, :, 1:, 0].mean((0, 2)) for layer in range(2)]).flatten()
    assert table.sort_values(["layer", "head"])["score"].tolist() == pytest.approx(expected.tolist())
    assert table["score"].is_monotonic_decreasing
    per_row = detect_heads(model, tokens, first_key.expand(2, 6, 6))
    assert per_row.equals(table)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_token_ids_score_as_their_text(side):
    """The model left out the padding that it found in token ids, but the scores counted it as queries."""
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    texts = ["red blue cat red blue cat red blue", "red blue red"]
    expected = head_scores(model, texts)
    ids = model.to_tokens(texts, padding_side=side)
    # Float32 attention of differently padded batches.
    assert (head_scores(model, ids) - expected).abs().max().max() < 1e-6
    found = detect_heads(model, ids, "induction")["score"]
    assert found.to_dict() == pytest.approx(expected["induction"].to_dict(), abs=1e-6)


def test_a_mask_of_ones_makes_tokens_of_padding():
    """A second call without the mask would look for padding again."""
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    ids = torch.tensor([5, 6, 7, model.tokenizer.pad_token_id])
    patterns = model.run_with_cache(ids, names_filter="pattern", attention_mask=torch.ones(4))[1]
    expected = torch.stack([patterns["pattern", i][0].diagonal(-1, 1, 2).mean(-1) for i in range(model.cfg.n_layers)])
    scores = score_heads(model, ids, previous_token_target(ids[None]), attention_mask=torch.ones(4))
    assert scores.flatten().tolist() == pytest.approx(expected.flatten().tolist())


def test_repeated_tokens_without_a_tokenizer():
    model = make_model("rotary")
    tokens = repeated_random_tokens(model, n_rows=3, period=7, seed=2)
    assert tokens.shape == (3, 14)
    assert tokens[:, :7].equal(tokens[:, 7:])
    assert not tokens.equal(repeated_random_tokens(model, n_rows=3, period=7, seed=3))


def test_special_tokens_are_not_drawn():
    class Tokenizer:
        bos_token_id = 0
        all_special_ids = (0, 1, 2, 3)

        def __len__(self):
            return 6

        def __call__(self, text, **options):
            raise NotImplementedError

        def decode(self, token_ids, **options):
            raise NotImplementedError

    model = HookedCausalLM(make_config(), Tokenizer())
    tokens = repeated_random_tokens(model, n_rows=4, period=9)
    assert tokens.shape == (4, 19)
    assert (tokens[:, 0] == 0).all()
    assert set(tokens[:, 1:].flatten().tolist()) == {4, 5}


def test_the_table_of_all_kinds():
    model = make_model("rotary")
    table = head_scores(model)
    assert table.columns.tolist() == ["layer", "head", "previous_token", "duplicate_token", "induction"]
    assert table.index.tolist() == model.all_head_labels()
    tokens = repeated_random_tokens(model, period=15)
    expected = score_heads(model, tokens, duplicate_token_target(tokens)).flatten()
    assert table["duplicate_token"].tolist() == pytest.approx(expected.tolist())


def test_bad_input():
    model = make_model("rotary")
    tokens = random_tokens(1, 5)
    with pytest.raises(InputError, match=r"period=16 makes 32 tokens|period=17 makes 34 tokens; .* n_ctx=32"):
        repeated_random_tokens(model, period=17)
    with pytest.raises(InputError, match="n_rows=0, period=3; expected numbers from 1 on"):
        repeated_random_tokens(model, n_rows=0, period=3)
    with pytest.raises(InputError, match=r"the target has shape \[4, 4\] and .*; expected \[query, key\] \[5, 5\]"):
        detect_heads(model, tokens, torch.ones(4, 4, dtype=torch.bool))
    with unchecked(), pytest.raises(InputError, match=r"dtype torch.float32; .* torch.bool: which keys count"):
        detect_heads(model, tokens, torch.full((5, 5), 0.5).tril())
    with pytest.raises(InputError, match=r"the target has 10 keys after their query, such as key 1 for query 0, which"):
        detect_heads(model, tokens, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="no query has a target"):
        detect_heads(model, torch.arange(5)[None], "induction")
    with unchecked(), pytest.raises(InputError, match="target is 'induktion'; expected 'previous_token', "):
        detect_heads(model, tokens, "induktion")
