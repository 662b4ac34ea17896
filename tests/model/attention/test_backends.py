"""Tests of hooklens.model.attention.backends: every way to compute attention gives the same numbers."""

import copy
import warnings

import pytest
import torch

from hooklens import patching
from hooklens.config import AlibiPositions, RotaryPositions
from hooklens.errors import ConfigError, InputError
from hooklens.model.attention import backends
from tests.model.networks import make_config, make_model, pad_rows, random_tokens
from tests.torch_version import takes_any_width

# Heads as wide as every PyTorch's flex_attention takes them, but for one network.
NETWORKS = {
    "rotary, window": make_config(positions=RotaryPositions(dim=6), windows=(3, None), d_head=8),
    "grouped, sinks, cap": make_config(n_kv_heads=2, attn_sinks=True, attn_softcap=2.0, chunks=(4, None), d_head=8),
    "alibi": make_config(positions=AlibiPositions(), n_kv_heads=1),
    "not causal": make_config(positions=RotaryPositions(dim=6), causal=False),
}
# Sums of a few numbers in another order.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
WAYS = [
    pytest.param(network, backend, dtype, marks=takes_any_width if backend == "flex" and cfg.d_head == 6 else ())
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


@torch.no_grad()
def test_heads_that_an_older_flex_attention_takes_none_of_are_refused(monkeypatch):
    """A ValueError from inside PyTorch 2.6 named neither the backend nor another one."""
    monkeypatch.setattr(backends, "_FLEX_TAKES_ANY_WIDTH", False)
    model, ids = use(make_model(NETWORKS["alibi"]), "flex"), random_tokens(1, 4)
    with pytest.raises(InputError, match=r"'flex': heads are 6 wide.*powers of 2.*set_attention_backend\('auto'\)"):
        model(ids)
    model.set_attention_backend("explicit")
    model(ids)
    use(make_model(NETWORKS["rotary, window"]), "flex")(ids)


def test_the_backend_is_no_part_of_what_a_network_is():
    cfg = NETWORKS["alibi"]
    other = cfg.replace(attention_backend="explicit")
    assert other == cfg
    assert other.fingerprint == cfg.fingerprint
    assert type(cfg).from_json(other.to_json()).attention_backend == "explicit"
    model = make_model(cfg)
    kv = use(model, "explicit").prefill(random_tokens(1, 4))
    model(random_tokens(2, 3), past_kv_cache=kv)
