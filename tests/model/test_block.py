"""Tests of hooklens.model.block: what reaches what, recomputed from the block's own parts."""

import pytest
import torch

from tests.model.networks import ALL_CONFIGS, CONFIGS, make_config, make_model, random_tokens


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_the_stream_is_the_sum_of_what_is_written(network):
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(2, 5))
    for block in model.cfg.blocks:
        written = [name for name, part in (("attn_out", block.attn), ("mlp_out", block.mlp)) if part is not None]
        total = sum((cache[name, block.layer] for name in written), cache["resid_pre", block.layer])
        torch.testing.assert_close(cache["resid_post", block.layer], total, rtol=1e-12, atol=1e-12)
        has_mid = model.cfg.wiring == "sequential" and len(written) == 2
        assert (f"blocks.{block.layer}.hook_resid_mid" in cache) is has_mid


@pytest.mark.parametrize("network", ["grouped", "alibi", "capped", "bare"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_edit_of_resid_mid_reaches_the_mlp_and_the_skip(network, grad):
    """It did not reach the skip connection, so patching all of it did not restore the clean logits."""
    model, clean, corrupted = make_model(network), random_tokens(2, 5), random_tokens(2, 5, seed=2)
    with torch.set_grad_enabled(grad):
        expected, cache = model.run_with_cache(clean)
        patch = [("resid_mid1", lambda t, hook: cache["resid_mid", 1])]
        assert torch.equal(model.run_with_hooks(corrupted, fwd_hooks=patch), expected)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("network", CONFIGS)
def test_an_edit_of_mlp_in_reaches_the_mlp_only(network, in_place):
    model, tokens = make_model(network), random_tokens(2, 5)
    _, plain = model.run_with_cache(tokens)

    def edit(tensor, hook):
        return tensor.neg_() if in_place else -tensor

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, fwd_hooks=[("mlp_in1", edit)])
    block = model.block_list()[1]
    stream = "resid_pre" if model.cfg.wiring == "parallel" else "resid_mid"
    norm = block.ln1 if model.cfg.shared_norm else block.ln2
    mlp_in = -plain[stream, 1]
    written = block.mlp(mlp_in if norm is None else norm(mlp_in))
    written = written if block.ln2_post is None else block.ln2_post(written)
    torch.testing.assert_close(cache["mlp_in", 1], mlp_in)
    torch.testing.assert_close(cache["mlp_out", 1], written.detach(), rtol=1e-12, atol=1e-12)
    for name in (stream, "resid_pre", "attn_out"):
        assert torch.equal(cache[name, 1], plain[name, 1]), name
    skip = plain["resid_pre", 1] + plain["attn_out", 1]
    torch.testing.assert_close(cache["resid_post", 1], skip + written.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_in", "unembed.hook_in"])
@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_in_place_edit_leaves_captured_tensors_upstream_alone(network, point, mode):
    """The stream entering a block is the tensor that left the one below: an edit there changed what was cached."""
    model, tokens = make_model(network), random_tokens(2, 5)
    with mode():
        _, plain = model.run_with_cache(tokens)
        logits, cache = model.run_with_cache(tokens, fwd_hooks=[(point, lambda t, hook: t.add_(1.5))])
        replaced = model.run_with_hooks(tokens, fwd_hooks=[(point, lambda t, hook: t + 1.5)])
        assert torch.equal(logits, replaced)
    assert torch.equal(cache[point], plain[point] + 1.5)
    for name in list(plain)[: list(plain).index(point)]:
        assert torch.equal(cache[name], plain[name]), name


def heads_by_hand(model, inputs):
    """Block 1's queries, keys and values from a stream per head."""
    block = model.block_list()[1]

    def project(x, weight, bias):
        x = x if block.ln1 is None else block.ln1(x)
        out = torch.einsum("bpnd,ndh->bpnh", x, weight)
        return out if bias is None else out + bias

    attn = block.attn
    parts = ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
    return [project(x, *part).detach() for x, part in zip(inputs, parts, strict=True)]


@pytest.mark.parametrize("watch_norm", [False, True])
@pytest.mark.parametrize("network", ["rotary", "grouped", "alibi, grouped", "shared norm", "bare"])
def test_inputs_per_head(network, watch_norm):
    """`ln1` ran three times when inputs were split, so its hooks fired three times."""
    model, tokens = make_model(network), random_tokens(2, 5)
    n_kv_heads, group = model.cfg.n_kv_heads, model.cfg.n_heads // model.cfg.n_kv_heads
    _, plain = model.run_with_cache(tokens)
    generator = torch.Generator().manual_seed(3)
    noise = {n: torch.randn(2, 5, n, 12, generator=generator, dtype=torch.float64) for n in (4, n_kv_heads)}
    fired = []
    hooks = [(name, lambda t, hook: t + noise[t.shape[2]]) for name in ("q_input1", "k_input1", "v_input1")]
    if watch_norm and model.cfg.norm_before:
        hooks.append(("blocks.1.ln1.hook_scale", lambda t, hook: fired.append(hook.name)))
    _, cache = model.run_with_cache(tokens, fwd_hooks=hooks)
    stream = plain["resid_pre", 1][:, :, None]
    by_hand = heads_by_hand(model, (stream + noise[4], stream + noise[n_kv_heads], stream + noise[n_kv_heads]))
    for name, expected in zip("qkv", by_hand, strict=True):
        torch.testing.assert_close(cache[name, 1], expected, rtol=1e-10, atol=1e-10)
    assert len(fired) == (1 if watch_norm and model.cfg.norm_before else 0)
    _, cache = model.run_with_cache(tokens, fwd_hooks=[("attn_in1", lambda t, hook: t + noise[4])])
    shared = (stream + noise[4]).view(2, 5, n_kv_heads, group, 12).mean(3)
    for name, expected in zip("qkv", heads_by_hand(model, (stream + noise[4], shared, shared)), strict=True):
        torch.testing.assert_close(cache[name, 1], expected, rtol=1e-10, atol=1e-10)


def test_norms_after_the_branch_come_before_the_write():
    model = make_model(make_config(norm_before=False, norm_after=True))
    _, cache = model.run_with_cache(random_tokens(1, 4))
    block = model.block_list()[0]
    raw = block.mlp(cache["resid_mid", 0])
    torch.testing.assert_close(cache["mlp_out", 0], block.ln2_post(raw).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("point", ["q_input0", "attn_in1", "mlp_in0"])
@pytest.mark.parametrize("network", ["grouped", "shared norm", "rotary"])
def test_watching_changes_nothing_beside_an_edit(network, point, dtype):
    """Capturing the norm moved the logits of a call that edits a copy of its input, in bfloat16 by 4e-3."""
    model, tokens = make_model(network, dtype=dtype), random_tokens(2, 5)
    hooks = [(point, lambda tensor, hook: tensor * 1.5)]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    watched, _ = model.run_with_cache(tokens, names_filter="*", fwd_hooks=hooks)
    assert torch.equal(watched, expected)
