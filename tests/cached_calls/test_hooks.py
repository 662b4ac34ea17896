"""Hooks, edits and gradients on cached calls."""

import pytest
import torch

from hooklens import edits
from tests.cached_calls.networks import assert_close, build
from tests.model.networks import ALL_CONFIGS, activations_of, random_tokens


@pytest.mark.parametrize("network", ALL_CONFIGS)
@pytest.mark.parametrize("rows_of_prefix", [1, 3])
@torch.no_grad()
def test_watching_a_call_on_a_frozen_prefix_changes_nothing(network, rows_of_prefix):
    """Every hook point fires once; logits are bit-identical; the pattern covers past + new."""
    model = build(network, torch.float32)
    prefix, suffixes = random_tokens(rows_of_prefix, 6), random_tokens(3, 2, seed=2)
    kv = model.prefill(prefix)
    plain = model(suffixes, past_kv_cache=kv)
    fired: list[str] = []
    logits, captured = model.run_with_cache(
        suffixes,
        past_kv_cache=kv,
        names_filter="*",
        fwd_hooks=[("*", lambda tensor, hook: fired.append(hook.name))],
    )
    assert torch.equal(logits, plain)
    assert sorted(fired) == sorted(activations_of(model))
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    _, expected = model.run_with_cache(whole, names_filter="*")
    for name in activations_of(model):
        found, full = captured[name], expected[name]
        if name.endswith(("pattern", "attn_scores")):
            assert found.shape[-2:] == (2, 8)
            full = full[:, :, 6:]
        else:
            full = full[:, 6:]
        finite = full.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert_close(found[finite], full[finite])


EDITS = [
    edits.Scale("blocks.0.hook_resid_pre", 1.5, pos=7),
    edits.Add("blocks.1.hook_resid_pre", 2.0, pos=-1),
    edits.Zero("blocks.1.attn.hook_z", head=1, pos=[6, 7]),
    edits.Zero("blocks.1.attn.hook_v", pos=slice(6, None)),
    edits.Zero("blocks.0.attn.hook_pattern", head=0, pos=7),
    edits.Scale("blocks.0.attn.hook_attn_scores", 0.5, pos=-2),
    edits.Scale("blocks.0.attn.hook_k", 3.0, pos=6),
]


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{type(edit).__name__} {edit.name} {edit.pos}")
@pytest.mark.parametrize("network", ["grouped", "alibi", "capped"])
def test_edits_name_absolute_positions_on_a_cached_call(network, edit):
    model = build(network)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    expected = model.run_with_hooks(whole, edits=[edit])[:, 6:]
    found = model.run_with_hooks(suffixes, past_kv_cache=model.prefill(prefix), edits=[edit])
    assert_close(found, expected)
    assert not torch.equal(found, model(suffixes, past_kv_cache=model.prefill(prefix)))


@torch.no_grad()
def test_edits_while_the_prefix_is_cached_are_in_the_cache():
    model = build("grouped")
    edit = edits.Scale("blocks.0.attn.hook_rot_k", 2.0, pos=3)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    with model.hooks(edits=[edit]):
        kv = model.prefill(prefix)
    expected = model.run_with_hooks(torch.cat([prefix.expand(3, -1), suffixes], 1), edits=[edit])[:, 6:]
    assert_close(model(suffixes, past_kv_cache=kv), expected)


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_gradients_through_suffixes_equal_the_full_runs(network):
    model = build(network)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    gradients = []
    for tokens, kv in ((whole, None), (suffixes, model.prefill(prefix))):
        delta = torch.zeros(3, 2, model.cfg.d_model, dtype=torch.float64, requires_grad=True)

        def add(stream, hook, delta=delta):
            return torch.cat([stream[:, :-2], stream[:, -2:] + delta], 1)

        logits = model.run_with_hooks(tokens, past_kv_cache=kv, fwd_hooks=[("hook_embed", add)])
        logits[:, -2:].square().sum().backward()
        gradients.append(delta.grad)
    model.zero_grad()
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("network", ["rotary", "grouped", "alibi", "capped"])
def test_explicit_way_equals_the_kernels(network):
    """Where autograd records, attention over the two parts is computed without the fused kernel."""
    model = build(network)
    kv = model.prefill(random_tokens(1, 6))
    suffixes = random_tokens(3, 4, seed=2)
    with torch.no_grad():
        fused = model(suffixes, past_kv_cache=kv)
    explicit = model(suffixes, past_kv_cache=kv)
    assert explicit.requires_grad
    assert_close(explicit.detach(), fused)
