"""Summaries of distributions, in chunks and blocks, against those of whole distributions by plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from hooklens.analysis.lens import logit_lens, vocabulary
from hooklens.analysis.lens.vocabulary import summarize
from hooklens.model.stream_reader import StreamReader
from tests.model.networks import CONFIGS, D_VOCAB, Allocations, make_model, random_tokens


def whole(model, stream, final, k, targets):
    """KL, entropy, top k, log-probability and rank, by the definitions."""
    q = StreamReader(model).read(stream).flatten(0, 1)
    p = StreamReader(model).read(final).flatten(0, 1)
    own = q.gather(-1, targets.flatten()[:, None])
    top = q.sort(dim=-1, descending=True)
    return {
        "kl": (p.exp() * (p - q)).sum(-1),
        "entropy": -(q.exp() * q).sum(-1),
        "top": top.indices[:, :k],
        "top_logprobs": top.values[:, :k],
        "target_logprob": own[:, 0],
        "target_rank": (q > own).sum(-1),
    }


@settings(max_examples=15)
@given(
    network=st.sampled_from(["rotary", "capped", "alibi", "learned, tied"]),
    chunk=st.integers(1, D_VOCAB + 2),
    most=st.integers(1, 200),
    k=st.integers(1, D_VOCAB),
    seed=st.integers(0, 5),
)
def test_any_chunks_give_the_numbers_of_whole_distributions(network, chunk, most, k, seed):
    model = make_model(network)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, 2, 3, model.cfg.d_model, generator=generator, dtype=torch.float64)
    targets = torch.randint(D_VOCAB, (2, 3), generator=generator)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vocabulary, "MOST_LOGITS", most)
        found = dict(
            summarize(StreamReader(model), [("a", draw[0]), ("b", draw[1])], draw[2], k=k, targets=targets, chunk=chunk)
        )
    for name, stream in zip("ab", draw, strict=False):
        # The same sums in another order, in float64.
        for field, value in whole(model, stream, draw[2], k, targets).items():
            assert_close(getattr(found[name], field), value, rtol=1e-10, atol=1e-12)


def test_without_a_target():
    model = make_model("rotary")
    stream = torch.randn(1, 2, 12, dtype=torch.float64)
    [(_, summary)] = summarize(StreamReader(model), [("a", stream)], stream, k=2, chunk=5)
    assert summary.target_rank is None
    assert summary.target_logprob is None
    # A distribution beside itself; the chunks of both passes are the same products.
    assert summary.kl.abs().max() < 1e-14


def test_equal_logits_do_not_outrank_the_target():
    model = make_model("rotary")
    with torch.no_grad():
        model.unembed.proj.weight[7] = model.unembed.proj.weight[3]
    stream = torch.randn(1, 4, 12, dtype=torch.float64)
    reader = StreamReader(model)
    [(_, by_3)] = summarize(reader, [("a", stream)], stream, k=1, targets=torch.full((1, 4), 3), chunk=5)
    [(_, by_7)] = summarize(reader, [("a", stream)], stream, k=1, targets=torch.full((1, 4), 7), chunk=5)
    assert_close(by_3.target_logprob, by_7.target_logprob)


def test_a_large_vocabulary_is_never_whole_for_all_tokens(monkeypatch):
    """`[batch pos d_vocab]` of a stream, and of the last one, was made at once."""
    monkeypatch.setattr(vocabulary, "CHUNK", 5)
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", 30)
    model = make_model("rotary")
    tokens = random_tokens(2, 9)
    _, cache = model.run_with_cache(tokens, names_filter="*resid*")
    with Allocations() as made:
        table = logit_lens(model, cache, pos_slice=None, target=3, k=1)
    largest = max(
        torch.Size(shape).numel() for name, shape in made.sizes if len(shape) == 2 and shape[-1] in (5, D_VOCAB)
    )
    assert largest <= 30
    assert not [shape for _, shape in made.sizes if len(shape) == 3 and shape[-1] == D_VOCAB]
    monkeypatch.undo()
    plain = logit_lens(model, cache, pos_slice=None, target=3, k=1)
    assert_close(torch.tensor(table.kl), torch.tensor(plain.kl), rtol=1e-10, atol=1e-12)
    assert table.top_tokens.tolist() == plain.top_tokens.tolist()
    assert table.target_rank.tolist() == plain.target_rank.tolist()


@pytest.mark.parametrize("network", CONFIGS)
def test_what_stands_around_the_unembedding_has_its_part(network, monkeypatch):
    """`W_U` in chunks would be read past a hook on the module that multiplies with it."""
    monkeypatch.setattr(vocabulary, "CHUNK", 5)
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(1, 4))
    if "proj" not in model.unembed._modules:
        assert StreamReader(model).takes_parts
        return
    model.unembed.proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert not StreamReader(model).takes_parts
    logits = model(cache.tokens)
    table = logit_lens(model, cache, k=1)
    assert table[table.stream == "final_post"].top_probs.iloc[0][0] == pytest.approx(
        float(logits.detach()[0, -1].softmax(-1).max())
    )


def test_a_replaced_unembedding_is_read_whole():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    before = logit_lens(model, cache)
    plain = nn.Linear(12, D_VOCAB, bias=False).double()
    plain.weight = model.unembed.proj.weight
    model.unembed = plain
    after = logit_lens(model, cache)
    assert after.top_tokens.tolist() == before.top_tokens.tolist()
    assert after.kl.tolist() == pytest.approx(before.kl.tolist(), abs=1e-12)
