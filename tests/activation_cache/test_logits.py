"""Logit attributions against the logits that the model gave."""

import pytest
import torch
from torch.testing import assert_close

from hooklens.errors import CacheError
from tests.model.networks import CONFIGS, D_VOCAB, make_model, random_tokens


@pytest.fixture(params=CONFIGS)
def run(request):
    model = make_model(request.param)
    _, cache = model.run_with_cache(random_tokens(2, 5))
    # Before a soft cap.
    return cache, cache["unembed.hook_out"]


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_attributions_and_bias_sum_to_the_logit_difference(run, expand_neurons):
    """Float64, logits up to 30: 1e-9 is rounding."""
    cache, logits = run
    stack = cache.get_full_resid_decomposition(expand_neurons=expand_neurons)
    rows, positions = torch.arange(2)[:, None], torch.arange(5)
    for answer, wrong in ((3, 7), (torch.tensor(3), None), (random_tokens(2, 5), random_tokens(2, 5, seed=9))):
        attributed = cache.logit_attrs(stack, answer, wrong).sum(0) + cache.logit_attr_bias(answer, wrong)
        expected = logits[rows, positions, answer] - (0 if wrong is None else logits[rows, positions, wrong])
        assert_close(attributed, expected, rtol=0, atol=1e-9)


def test_the_last_stream_as_a_whole_gives_the_logit(run):
    cache, logits = run
    attributed = cache.logit_attrs(cache.accumulated_resid(), 3)[-1] + cache.logit_attr_bias(3)
    assert_close(attributed, logits[..., 3], rtol=0, atol=1e-9)
    assert_close(cache.logit_attrs(cache["resid_post", -1], 3) + cache.logit_attr_bias(3), attributed)


def test_one_answer_per_row(run):
    """TransformerLens broadcasts `[batch]` answers against positions where the stack has both axes."""
    cache, logits = run
    answers, wrong = torch.tensor([3, 4]), torch.tensor([7, 9])
    stack = cache.decompose_resid()
    bias = cache.logit_attr_bias(answers, wrong)
    expected = torch.stack([logits[row, :, answers[row]] - logits[row, :, wrong[row]] for row in range(2)])
    attributed = cache.logit_attrs(stack, answers, wrong)
    assert_close(attributed.sum(0) + bias[:, None], expected)
    last = cache.logit_attrs(stack[:, :, -1], answers, wrong, pos_slice=-1)
    assert_close(last.sum(0) + bias, expected[:, -1])


def test_rows(run):
    cache, _ = run
    stack = cache.decompose_resid()
    whole = cache.logit_attrs(stack, torch.tensor([3, 4]))
    assert_close(cache.logit_attrs(stack, torch.tensor([4]), batch_slice=[1]), whole[:, [1]])
    assert_close(cache.logit_attrs(stack, 4, batch_slice=1), whole[:, 1])
    assert_close(cache.logit_attrs(stack[:, 1], 4, batch_slice=1, has_batch_dim=False), whole[:, 1])
    single = cache.apply_slice_to_batch_dim(0)
    assert_close(single.logit_attrs(single.decompose_resid(), torch.full((5,), 3)), whole[:, 0])


def test_tokens_that_cannot_be_attributed():
    _, cache = make_model("rotary").run_with_cache(random_tokens(2, 5))
    stack = cache.decompose_resid()
    with pytest.raises(
        CacheError, match=r"tokens is the text ' Mary', and a cache has no tokenizer; .*to_single_token"
    ):
        cache.logit_attrs(stack, " Mary")
    with pytest.raises(CacheError, match=rf"incorrect_tokens holds {D_VOCAB}; expected token ids from 0 to"):
        cache.logit_attrs(stack, 0, D_VOCAB)
    with pytest.raises(CacheError, match=r"tokens have shape \[2\] and incorrect_tokens \[\]; expected one incorrect"):
        cache.logit_attr_bias(torch.tensor([1, 2]), 3)
    with pytest.raises(CacheError, match=r"tokens have shape \[3\], the activations' batch and pos axes \[2, 5\]"):
        cache.logit_attrs(stack, torch.tensor([1, 2, 3]))
