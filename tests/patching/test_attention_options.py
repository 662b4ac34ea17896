"""Experiments on networks with options of attention, against the whole network run once for each number.

Bounds are those of the experiments' own tests: float64 rounding through two layers.
"""

from functools import partial

import pytest
import torch

from hooklens import patching
from hooklens.config import NormConfig, QueryTemperature, RotaryPositions, ShortformerPositions, SinusoidalPositions
from hooklens.errors import InputError
from hooklens.patching import Circuit, LogitDiff, LogProb
from tests.model.networks import RMS_NORM, make_config, make_model, random_tokens
from tests.patching.circuits.test_masked_run import at_reads, pair_of_batches, run
from tests.patching.estimates import published
from tests.patching.estimates.test_edges import assert_scores
from tests.patching.masked_reference import MaskedReference
from tests.patching.sweeps.test_sweep import METRIC, assert_exact, every_grid, pair
from tests.slow_cases import slow_but

NETWORKS = {
    "shortformer, clipped": make_config(
        positions=ShortformerPositions(offset=1), clip_qkv=0.9, n_kv_heads=2, chunks=(None, 4)
    ),
    "sinks": make_config(
        positions=SinusoidalPositions(), attn_sinks=True, query_temperature=QueryTemperature(scale=0.5, length=2)
    ),
    "normed": make_config(
        positions=(RotaryPositions(dim=4), RotaryPositions(dim=6)), qk_norm=RMS_NORM, qk_norm_over="all_heads",
        qk_norm_after_rotary=True, n_kv_heads=2, chunks=(3, None), norm=None,
    ),
    "normed per head": make_config(
        qk_norm=NormConfig(kind="layer", eps=1e-5), qk_norm_per_head=True, clip_qkv=0.7, attn_softcap=2.0,
        attn_sinks=True, windows=(2, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("network", slow_but(["shortformer, clipped", "sinks"], ["shortformer, clipped"]))
def test_sweeps(network):
    model = make_model(NETWORKS[network])
    clean, corrupted = pair(n=5)
    for grid in every_grid(model):
        if network.startswith("shortformer") and grid.site == "hook_pos_embed":
            continue
        result = patching.sweep(model, clean, corrupted, grid, METRIC, progress=False)
        assert_exact(model, clean, corrupted, result, 1e-10, seed=hash(grid.site) % 1000)


@pytest.mark.parametrize("network", [name for name, cfg in NETWORKS.items() if cfg.qk_norm_over == "head"])
def test_circuits(network):
    model = make_model(NETWORKS[network])
    clean, corrupted = pair_of_batches(model)
    full = Circuit.full(model.cfg)
    circuits = [full, Circuit(), Circuit(list(full)[::2]), Circuit(list(full)[1::3])]
    found = run(model, clean, corrupted, circuits)
    reference = MaskedReference(model, clean, corrupted)
    for circuit, logits in zip(circuits, found, strict=True):
        torch.testing.assert_close(logits, at_reads(reference.logits(circuit)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("network", "method"), [*((network, "eap") for network in NETWORKS), ("shortformer, clipped", "exact")]
)
def test_edges(network, method):
    """The gradient of a clipped value is 0, which a map of gradients at `hook_v` alone does not know."""
    model = make_model(NETWORKS[network])
    clean, corrupted = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
    metric = LogProb(4)
    found = patching.edge_attribution(model, clean, corrupted, metric, progress=False, method=method, rules="gradient")
    reference = {"eap": published.eap, "exact": published.exact}[method]
    assert_scores(found, reference(model, clean, corrupted, metric), atol=1e-10)


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_paths_into_heads_that_read_positions(letter):
    """Without norms a path from a head into a later one's input is that head's change, added there."""
    cfg = NETWORKS["shortformer, clipped"].replace(norm=None, attn_only=True, n_kv_heads=4)
    model = make_model(cfg)
    clean, corrupted = random_tokens(2, 6, seed=1), random_tokens(2, 6, seed=2)
    metric = LogitDiff(3, 5)
    found = patching.path_patch(model, clean, corrupted, ["a0.h1"], [f"a1.h2.{letter}"], metric, progress=False)

    name = "blocks.0.attn.hook_result"
    written = [model.run_with_cache(ids, names_filter=name)[1][name][:, :, 1] for ids in (corrupted, clean)]

    def add(change, tensor, hook):
        tensor = tensor.clone()
        tensor[:, :, 2] += change
        return tensor

    hook = (f"blocks.1.hook_{letter}_input", partial(add, written[1] - written[0]))
    expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[hook]))
    torch.testing.assert_close(found.per_pair.flatten(), expected.flatten(), rtol=0, atol=1e-10)


def test_heads_that_a_norm_mixes_make_no_circuit():
    """Heads that nobody asked for were given nothing, and with it the norm over all heads another denominator."""
    model = make_model(NETWORKS["normed"])
    clean, corrupted = pair()
    with pytest.raises(InputError, match=r"a norm goes over the queries and keys of all heads of layers \[0, 1\]"):
        patching.evaluate_circuits(model, clean, corrupted, [Circuit.full(model.cfg)], METRIC, progress=False)
    with pytest.raises(InputError, match="what one reads changes the others"):
        patching.discover_circuit(model, clean, corrupted, METRIC, threshold=0.1, progress=False)


def test_positions_that_every_layer_reads_are_no_site():
    """A row patched there would have had its change added to the stream, which those positions never enter."""
    model = make_model(NETWORKS["shortformer, clipped"])
    clean, corrupted = pair()
    with pytest.raises(patching.SiteError, match="shortformer positions enter the queries and keys of every layer"):
        patching.sweep(model, clean, corrupted, "hook_pos_embed", METRIC, progress=False)
    with (
        model.hooks([("hook_pos_embed", lambda tensor, hook: tensor * 2)]),
        pytest.raises(InputError, match="somebody listens at hook_pos_embed"),
    ):
        patching.sweep(model, clean, corrupted, "resid_pre", METRIC, progress=False)
