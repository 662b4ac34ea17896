"""Head scores against loops over positions, and on heads that are made to be what they are called."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.analysis.heads import (
    detect_heads,
    head_scores,
    repeated_random_tokens,
    score_heads,
)
from hooklens.analysis.targets import duplicate_token_target, induction_target, previous_token_target
from hooklens.config import AlibiPositions, PartConfig
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, pad_rows, random_tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("measure", ["mean_attention", "mul", "abs"])
def test_padding_with_a_token_of_the_rows_is_no_token(side, measure):
    """The pad id is a token of the rows, as where pad = EOS."""
    model = make_model("rotary")
    rows = [torch.tensor([0, 3, 0, 3, 3, 0, 3]), torch.tensor([3, 0, 3, 0])]
    tokens, mask = pad_rows(rows, side)
    found = score_heads(model, tokens, induction_target(tokens, mask), measure=measure, attention_mask=mask)
    alone = [score_heads(model, row[None], induction_target(row[None]), measure=measure) for row in rows]
    if measure == "mean_attention":
        asking = torch.tensor([float(induction_target(row[None]).any(-1).sum()) for row in rows])
        expected = (alone[0] * asking[0] + alone[1] * asking[1]) / asking.sum()
    else:
        expected = (alone[0] + alone[1]) / 2
    assert found.flatten().tolist() == pytest.approx(expected.flatten().tolist())
    table = detect_heads(model, tokens, "induction", measure=measure, attention_mask=mask)
    assert table.sort_index().score.tolist() == pytest.approx(found.flatten().tolist())


def transformer_lens_score(pattern, target, *, measure, exclude_bos, exclude_current_token):
    """`detect_head` of TransformerLens 2.x for one head and row, from its documentation; its rounding left out."""
    n = len(pattern)
    total, matched, apart = 0.0, 0.0, 0.0
    for query in range(n):
        for key in range(query + 1):
            if (exclude_bos and key == 0) or (exclude_current_token and key == query):
                continue
            total += float(pattern[query, key])
            matched += float(pattern[query, key] * target[query, key])
            apart += abs(float(pattern[query, key]) - float(target[query, key]))
    # The mean over n * n entries, times n.
    return matched / total if measure == "mul" else 1 - apart / n**2 * n


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_measures_of_transformer_lens(measure, exclude_bos, exclude_current_token, numbers):
    model = make_model("grouped")
    tokens = random_tokens(2, 8, d_vocab=3)
    target = induction_target(tokens)
    if numbers:
        target = target * torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"measure": measure, "exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    _, cache = model.run_with_cache(tokens, names_filter="pattern")
    scores = score_heads(model, tokens, target, **options)
    for layer in range(2):
        for head in range(4):
            patterns = cache["pattern", layer][:, head]
            rows = [transformer_lens_score(patterns[row], target[row], **options) for row in range(2)]
            assert float(scores[layer, head]) == pytest.approx(sum(rows) / 2)


@pytest.mark.parametrize("measure", ["mean_attention", "mul", "abs"])
def test_later_keys_of_a_network_that_is_not_causal(measure):
    model = make_model(make_config(causal=False))
    tokens = random_tokens(1, 5)
    _, cache = model.run_with_cache(tokens, names_filter="pattern")
    following = torch.eye(5, dtype=torch.bool).roll(1, 1).triu(1)
    scores = score_heads(model, tokens, following, measure=measure)
    for layer in range(2):
        for head in range(4):
            pattern = cache["pattern", layer][0, head]
            attention = float(pattern.diagonal(1).sum())
            expected = {
                "mean_attention": attention / 4,
                "mul": attention / float(pattern.sum()),
                "abs": 1 - float((pattern - following.double()).abs().sum()) / 5,
            }
            assert float(scores[layer, head]) == pytest.approx(expected[measure])


def test_scores_below_zero_are_listed():
    model = make_model("rotary")
    tokens = random_tokens(1, 8, d_vocab=3)
    table = detect_heads(model, tokens, -torch.ones(8, 8, dtype=torch.float64).tril(), measure="abs")
    assert len(table) == 8
    assert (table.score < 0).all()
    assert detect_heads(model, tokens, "induction", measure="abs", min_score=1.0).empty


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
    with pytest.raises(InputError, match="n_rows is 0, expected a whole number, 1 to 1048576"):
        repeated_random_tokens(model, n_rows=0, period=3)
    with pytest.raises(InputError, match=r"the target has shape \[4, 4\] and .*; expected \[query, key\] \[5, 5\]"):
        detect_heads(model, tokens, torch.ones(4, 4, dtype=torch.bool))
    with unchecked(), pytest.raises(InputError, match=r"dtype torch.float32; .* torch.bool: which keys count"):
        detect_heads(model, tokens, torch.full((5, 5), 0.5).tril())
    with pytest.raises(InputError, match=r"the target has 10 keys after their query, such as key 1 for query 0, which"):
        detect_heads(model, tokens, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="exclude_bos and exclude_current_token belong to the measures 'mul' and"):
        detect_heads(model, tokens, "previous_token", exclude_bos=True)
    with pytest.raises(InputError, match="no query has a target"):
        detect_heads(model, torch.arange(5)[None], "induction")
    with unchecked(), pytest.raises(InputError, match="target is 'induktion', expected 'previous_token', "):
        detect_heads(model, tokens, "induktion")


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([(1, 3), (0, 0)], {(1, 3), (0, 0)}),
        ({-1: [2, 0]}, {(1, 2), (1, 0)}),
        ({0: None}, {(0, 0), (0, 1), (0, 2), (0, 3)}),
        ({0: slice(-1, None), 1: 1}, {(0, 3), (1, 1)}),
        ([(0, -1)], {(0, 3)}),
    ],
)
@pytest.mark.parametrize("measure", ["mean_attention", "mul", "abs"])
def test_some_heads_score_as_among_all(heads, expected, measure):
    model = make_model("rotary")
    tokens = random_tokens(2, 9, d_vocab=4)
    whole = score_heads(model, tokens, "induction", measure=measure)
    some = score_heads(model, tokens, "induction", measure=measure, heads=heads)
    assert {tuple(place) for place in (~some.isnan()).nonzero().tolist()} == expected
    assert torch.equal(some[~some.isnan()], whole[~some.isnan()])
    table = detect_heads(model, tokens, "induction", measure=measure, heads=heads)
    assert set(zip(table.layer, table["head"], strict=True)) == expected
    assert table.index.tolist() == [f"L{layer}H{head}" for layer, head in zip(table.layer, table["head"], strict=True)]
    assert table.score.tolist() == sorted((float(whole[place]) for place in expected), reverse=True)


def test_only_patterns_of_layers_with_a_head_to_score_are_made():
    model = make_model("rotary")
    seen = []
    with model.hooks([("pattern", lambda pattern, hook: seen.append(hook.name))]):
        score_heads(model, random_tokens(1, 6, d_vocab=3), "induction", heads=[(0, 1)])
    # One's own hook listens in the layers that run.
    assert seen == ["blocks.0.attn.hook_pattern"]


def test_heads_that_are_not_there():
    model = make_model("rotary")
    tokens = random_tokens(1, 9, d_vocab=4)
    for heads, match in (
        ([(2, 0)], r"heads: layer: 2 out of range; there are 2 layers"),
        ([(0, 4)], r"heads: layer 0: 4 out of range; there are 4 heads"),
        ({0: [1], -2: [1]}, r"layer 0 names \[1\] more than once"),
        ([], r"heads is \[\], expected a mapping from layer to heads"),
        ({0: slice(0, 0)}, "no head is named"),
        ("L0H1", "expected a mapping from layer to heads, or a list of pairs"),
        ([0, 1], "expected a mapping from layer to heads, or a list of pairs"),
        ([(0, True)], "a head is True, expected a whole number"),
    ):
        with unchecked(), pytest.raises(InputError, match=match):
            detect_heads(model, tokens, "induction", heads=heads)
    mixed = make_model(make_config(attn=(None, PartConfig(kind="attention"))))
    with pytest.raises(InputError, match="heads: layer 0 has none"):
        score_heads(mixed, tokens, "induction", heads=[(0, 1)])
