"""Tests of hooklens.model.attention.backends: every way to compute attention gives the same numbers."""

import copy
import warnings

import pytest
import torch

from hooklens import patching
from hooklens.config import AlibiPositions, RotaryPositions
from hooklens.errors import ConfigError, InputError
from tests.model.networks import make_config, make_model, pad_rows, random_tokens

NETWORKS = {
    "rotary, window": make_config(positions=RotaryPositions(dim=6), windows=(3, None)),
    "grouped, sinks, cap": make_config(n_kv_heads=2, attn_sinks=True, attn_softcap=2.0, chunks=(4, None)),
    "alibi": make_config(positions=AlibiPositions(), n_kv_heads=1),
    "not causal": make_config(positions=RotaryPositions(dim=6), causal=False),
}
# Sums of a few numbers in another order.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
WAYS = [
    (network, backend, dtype)
    for network, cfg in NETWORKS.items()
    for backend in ("sdpa", "explicit", "flex")
    for dtype in DTYPES
    # PyTorch traces flex_attention anew for each shape, which takes seconds.
    if not (backend == "sdpa" and cfg.attn_sinks)
    and not (backend == "flex" and (network == "not causal" or dtype == torch.float32) and network != "alibi")
]


def use(model, backend):
    other = copy.deepcopy(model)
    other.set_attention_backend(backend)
    return other


@pytest.fixture(autouse=True)
def _no_warning_of_unfused_flex():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.mark.parametrize(("network", "backend", "dtype"), WAYS)
@torch.no_grad()
def test_backends_agree(network, backend, dtype):
    """Padded rows, on their own and behind a frozen prefix of one row, decoded, and watched."""
    model, bound = make_model(NETWORKS[network], dtype=dtype), DTYPES[dtype]
    other = use(model, backend)
    ids, mask = pad_rows([random_tokens(1, n)[0] for n in (9, 5, 7)], "left")

    expected, cache = model.run_with_cache(ids, attention_mask=mask, names_filter="*hook_pattern")
    found, watched = other.run_with_cache(ids, attention_mask=mask, names_filter="*hook_pattern")
    assert (found - expected)[mask.bool()].abs().max() < bound
    assert torch.equal(other(ids, attention_mask=mask), found)
    for name, pattern in cache.items():
        assert (watched[name] - pattern).abs().max() < bound

    if model.cfg.causal:
        prefix, prompts = random_tokens(1, 6, seed=3), random_tokens(3, 4, seed=4)
        on_prefix = [one(prompts, past_kv_cache=one.prefill(prefix)) for one in (model, other)]
        assert (on_prefix[0] - on_prefix[1]).abs().max() < bound
        if backend != "flex":
            ours, others = (
                one.generate(prompts, max_new_tokens=4, do_sample=False, verbose=False) for one in (model, other)
            )
            assert torch.equal(ours, others)


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_gradients_agree(backend):
    model = make_model(NETWORKS["alibi"])
    other, ids = use(model, backend), random_tokens(2, 7)
    for one in (model, other):
        one(ids, return_type="loss").backward()
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert (found.grad - expected.grad).abs().max() < 1e-12


def test_edits_of_the_pattern_act_in_every_backend():
    model, ids = make_model(NETWORKS["grouped, sinks, cap"]), random_tokens(2, 7)
    edit = [("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)]
    with torch.no_grad():
        expected = model.run_with_hooks(ids, fwd_hooks=edit)
        for backend in ("explicit", "flex"):
            assert (use(model, backend).run_with_hooks(ids, fwd_hooks=edit) - expected).abs().max() < 1e-12


@torch.no_grad()
def test_experiments_run_in_every_backend():
    """Packed rows behind a frozen past, whose masks no kernel is told by `is_causal`."""
    model, clean, corrupted = make_model(NETWORKS["rotary, window"]), random_tokens(2, 6), random_tokens(2, 6, seed=2)
    metric = patching.LogitDiff(3, 5)
    expected = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
    for backend in ("sdpa", "explicit"):
        found = patching.sweep(use(model, backend), clean, corrupted, "resid_pre", metric, progress=False)
        assert (found.per_pair - expected.per_pair).abs().max() < 1e-12


def test_what_a_backend_cannot_do_is_refused():
    model = make_model(NETWORKS["grouped, sinks, cap"])
    with pytest.raises(
        ConfigError, match=r"has no soft cap \(attn_softcap=2.0\).*\n.*has no sinks \(attn_sinks=True\)"
    ):
        model.set_attention_backend("sdpa")
    with pytest.raises(InputError, match="backend is 'flash', expected 'auto', 'sdpa', 'explicit' or 'flex'"):
        model.set_attention_backend("flash")
    assert model.cfg.attention_backend == "auto"
    with pytest.raises(InputError, match=r"'flex' has no gradients on the CPU.*torch.no_grad"):
        use(model, "flex")(random_tokens(1, 4))


def test_the_backend_is_no_part_of_what_a_network_is():
    cfg = NETWORKS["alibi"]
    other = cfg.replace(attention_backend="explicit")
    assert other == cfg
    assert other.fingerprint == cfg.fingerprint
    assert type(cfg).from_json(other.to_json()).attention_backend == "explicit"
    model = make_model(cfg)
    kv = use(model, "explicit").prefill(random_tokens(1, 4))
    model(random_tokens(2, 3), past_kv_cache=kv)
