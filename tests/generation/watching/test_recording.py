"""What is captured while generating equals one full rerun with the same edits."""

import pytest
import torch

from hooklens import HookPoint, edits
from hooklens.errors import HookNameError
from tests.generation.networks import RAGGED, left_pad, pair, with_padding_id


def assert_equals_rerun(model, out, **keywords):
    """Compare every row of the captured activations with a run of that row alone."""
    for row in range(len(out.tokens)):
        n_run = out.prompt_lengths[row] + out.n_new_tokens[row] - 1
        _, expected = model.run_with_cache(out.tokens[row : row + 1, :n_run], names_filter="*", **keywords)
        found = out.cache.unpad(row)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            # float32 sums in another order, through a few layers with weights of size one.
            torch.testing.assert_close(found[name], tensor, atol=3e-4, rtol=3e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "neox-parallel", "falcon-rw", "falcon-40b"])
def test_capture_equals_one_full_rerun_with_the_same_edits(name, use_cache):
    model, _ = pair(name)
    ids, _ = left_pad(RAGGED)
    keywords = {
        "max_new_tokens": 7,
        "seed": 0,
        "edits": [edits.Scale("blocks.1.hook_attn_out", 0.5, pos=slice(1, 9))],
        "names_filter": "*",
        "use_past_kv_cache": use_cache,
        "return_type": "output",
        "verbose": False,
    }
    padded = with_padding_id(model)
    plain = padded.generate(ids, **keywords)
    # A row that ends first.
    out = padded.generate(ids, eos_token_id=int(plain.new_tokens[1][2]), **keywords)
    assert len(set(out.n_new_tokens)) > 1
    assert out.cache.tokens.shape == out.cache["hook_embed"].shape[:2]
    assert_equals_rerun(model, out, edits=keywords["edits"])


def test_samples_share_the_capture_of_their_prompt():
    model, _ = pair()
    out = model.generate(
        torch.tensor([[5, 17, 80], [9, 9, 1]]),
        num_return_sequences=2,
        max_new_tokens=5,
        seed=0,
        names_filter="*",
        return_type="output",
        verbose=False,
    )
    assert out.cache["resid_post", 0].shape == (4, 7, 32)
    assert_equals_rerun(model, out)


def test_capture_on_a_cache_holds_the_new_tokens_and_all_keys():
    model, _ = pair()
    kv = model.prefill(torch.tensor([[5, 17, 80]]))
    out = model.generate(
        torch.tensor([[61, 2], [33, 12]]),
        past_kv_cache=kv,
        max_new_tokens=4,
        do_sample=False,
        names_filter=["pattern", "resid_post", "attn_scores"],
        return_type="output",
        verbose=False,
    )
    _, expected = model.run_with_cache(
        out.tokens[:, :-1], past_kv_cache=kv, names_filter=["pattern", "resid_post", "attn_scores"]
    )
    assert out.cache["pattern", 0].shape == (2, 4, 5, 8)
    for name, tensor in expected.items():
        torch.testing.assert_close(out.cache[name], tensor, atol=3e-4, rtol=3e-4)
    assert out.cache.attention_mask.shape == (2, 8)


def test_columns_without_tokens_hold_zeros_or_masked_scores():
    model, _ = pair()
    ids, _ = left_pad(RAGGED)
    out = with_padding_id(model).generate(
        ids,
        max_new_tokens=3,
        do_sample=False,
        names_filter=["resid_post", "attn_scores", "pattern"],
        return_type="output",
        verbose=False,
    )
    n_run = 3 + 2
    assert (out.cache["resid_post", 1][1, n_run:] == 0).all()
    assert (out.cache["pattern", 1][1, :, n_run:] == 0).all()
    assert (out.cache["pattern", 1][1, :, :, n_run:] == 0).all()
    assert (out.cache["attn_scores", 1][1, :, n_run:] == -torch.inf).all()
    assert (out.cache["attn_scores", 1][1, :, :, n_run:] == -torch.inf).all()


def test_capturing_changes_no_bit_of_any_logit():
    model, _ = pair()
    keywords = {"seed": 0, "return_type": "output", "verbose": False}
    plain = model.generate(torch.tensor([[5, 17, 80]]), **keywords)
    watched = model.generate(
        torch.tensor([[5, 17, 80]]), names_filter=lambda name: not name.startswith("unembed"), **keywords
    )
    assert torch.equal(plain.logprobs, watched.logprobs)
    assert plain.cache is None
    # Capturing logits makes those of the whole prompt, in one product with another order of sums.
    everything = model.generate(torch.tensor([[5, 17, 80]]), names_filter="*", **keywords)
    assert everything.tokens.tolist() == plain.tokens.tolist()
    torch.testing.assert_close(everything.logprobs, plain.logprobs, atol=1e-5, rtol=1e-5)


def test_points_with_unknown_axes_are_refused():
    model = with_padding_id(pair()[0])
    model.mine = HookPoint()
    with pytest.raises(HookNameError, match=r"axes of 'mine' are not known"):
        model.generate(torch.tensor([[5]]), names_filter="mine", verbose=False)
