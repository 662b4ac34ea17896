"""Noise on embeddings is the same experiment as words that nobody uses, whose embeddings are the noised ones.

So every experiment is run twice: with noise, and in a network with one more word for each noised token of each draw,
on prompts that hold these words. The words have no logits of their own to speak of, which the metric does not read.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import InputError
from hooklens.hooks import edits
from hooklens.patching import LogitDiff, Noise
from hooklens.patching.pairs.prompts import read_pairs
from tests.model.networks import ALL_CONFIGS, D_VOCAB, make_model, random_tokens
from tests.slow_cases import slow_but

METRIC = LogitDiff(3, 5)
NETWORKS = ["rotary", "grouped", "learned, tied", "capped", "latent attention", "alibi", "shared norm"]
NOISE = Noise(pos=[1, -2], std=0.7, draws=2, seed=3)
# float64 rounding through two layers, far below any real difference.
TOLERANCE = 1e-10


def make_both(network: str, lengths=(6, 5)):
    """A network and clean prompts; the network with more words, and the prompts that hold them."""
    cfg = replace(ALL_CONFIGS[network], tied_unembed=False)
    model = make_model(cfg)
    rows = [row[:n] for row, n in zip(random_tokens(len(lengths), 6), lengths, strict=True)]
    prompts = [patching.Pair(row, row) for row in rows]
    pairs = read_pairs(model, prompts, NOISE)
    added = pairs.draw_noise(range(len(pairs)), 6, torch.float64)
    where = pairs.noise.chosen.nonzero().tolist()
    _, cache = model.run_with_cache(torch.arange(D_VOCAB)[:, None], names_filter="hook_embed")
    embeddings = cache["hook_embed"][:, 0]
    scale = 1.0 if cfg.embed_scale is None else cfg.embed_scale

    wider = HookedCausalLM(replace(cfg, d_vocab=D_VOCAB + len(where))).to(torch.float64)
    weights = model.named_weights()
    noised = [(embeddings[pairs.clean[pair, place]] + added[pair, place]) / scale for pair, place in where]
    with torch.no_grad():
        for name, weight in wider.named_weights().items():
            if name.endswith("W_E"):
                weight.copy_(torch.cat([weights[name], torch.stack(noised)]))
            elif name.endswith("W_U"):
                weight.zero_()[:, :D_VOCAB] = weights[name]
            elif name.endswith("b_U"):
                weight.zero_()[:D_VOCAB] = weights[name]
            else:
                weight.copy_(weights[name])
    words = []
    for pair, length in enumerate(pairs.lengths):
        clean = pairs.clean[pair, :length]
        corrupted = clean.clone()
        for number, (at, place) in enumerate(where):
            if at == pair:
                corrupted[place] = D_VOCAB + number
        words.append(patching.Pair(clean, corrupted))
    return (model, prompts, NOISE), (wider, words, None)


def assert_same(one, other, *, tolerance=TOLERANCE):
    assert one.shape == other.shape
    assert float(other.abs().max()) > 1e-3, "nothing was compared"
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


ENDS = patching.grid("resid_post", positions=[1, -2, -1])
SITES = ["hook_embed", "resid_pre", "attn_out", "mlp_out", "z", "q", "v", "pattern"]


@pytest.mark.parametrize(
    ("network", "direction"),
    slow_but(
        product(NETWORKS, ["denoise", "noise"]),
        [("rotary", "noise"), *((network, "denoise") for network in NETWORKS[1:5])],
    ),
)
def test_sweeps(network, direction):
    ours, theirs = make_both(network)
    sites = [patching.grid(site, positions=[1, -2, -1]) for site in SITES]
    found, expected = (
        [patching.sweep(*given, site, METRIC, direction=direction, progress=False) for site in sites]
        for given in (ours, theirs)
    )
    for one, other in zip(found, expected, strict=True):
        assert_same(one.per_pair, other.per_pair)
        assert_same(one.corrupted_per_pair, other.corrupted_per_pair)


@pytest.mark.parametrize(
    "edit",
    [
        edits.Scale("blocks.0.hook_attn_out", 0.5),
        edits.Scale("hook_embed", 0.5, pos=1),
        edits.Mean("blocks.0.hook_resid_mid"),
        edits.Custom("blocks.1.attn.hook_z", lambda z: 0.5 * z.cumsum(0)),
    ],
)
def test_sweeps_of_edited_models(edit):
    """The noise comes before the edits, in planned runs and in full ones."""
    ours, theirs = make_both("grouped")
    for direction in ("denoise", "noise"):
        options = {"edits": [edit], "direction": direction, "progress": False}
        found, expected = (patching.sweep(*given, ENDS, METRIC, **options) for given in (ours, theirs))
        assert_same(found.per_pair, expected.per_pair)


@pytest.mark.parametrize("options", [{}, {"method": "ig", "steps": 3}, {"rules": "gradient"}, {"rules": "atp*"}])
def test_attribution(options):
    ours, theirs = make_both("rotary")
    sites = [patching.grid(site, positions=[1, -2, -1]) for site in ("resid_pre", "z", "q")]
    for direction in ("denoise", "noise"):
        for site in sites:
            found, expected = (
                patching.attribution(*given, site, METRIC, direction=direction, progress=False, **options)
                for given in (ours, theirs)
            )
            assert_same(found.per_pair, expected.per_pair)


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "eap-ig-activations"])
def test_edge_attribution(method):
    ours, theirs = make_both("rotary")
    found, expected = (
        patching.edge_attribution(*given, METRIC, method=method, progress=False) for given in (ours, theirs)
    )
    assert_same(found.edges.scores, expected.edges.scores)


def test_paths():
    ours, theirs = make_both("grouped")
    found, expected = (
        patching.path_patch(*given, ["a0.h1", "m0", "embed"], ["a1.h2.q", "logits"], METRIC, progress=False)
        for given in (ours, theirs)
    )
    assert_same(found.per_pair, expected.per_pair)


@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_circuits(ablation):
    ours, theirs = make_both("grouped", lengths=(6, 6))
    chosen = [patching.random_circuits(patching.edge_attribution(*theirs, METRIC, progress=False).edges, [20])[0]]
    found, expected = (
        patching.evaluate_circuits(*given, chosen, METRIC, ablation=ablation, progress=False)
        for given in (ours, theirs)
    )
    assert_same(found.per_pair, expected.per_pair)
    curves = [
        patching.held_out_curve(*given, METRIC, split=None, random_draws=0, sizes=[5, 20], progress=False)
        for given in (ours, theirs)
    ]
    assert_same(curves[0].curve.result.per_pair, curves[1].curve.result.per_pair)


def test_discovery():
    ours, theirs = make_both("rotary")
    found, expected = (
        patching.discover_circuit(*given, METRIC, threshold=0.003, holdout=0, progress=False)
        for given in (ours, theirs)
    )
    assert found.circuit == expected.circuit
    assert 0 < len(found.circuit) < found.stats.edges


@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_units(ablation):
    ours, theirs = make_both("rotary", lengths=(6, 6))
    options = {"ablation": ablation, "method": "exact", "progress": False}
    found, expected = (
        patching.score_units(*given, ["blocks.0.mlp.hook_post"], METRIC, **options) for given in (ours, theirs)
    )
    assert_same(found.scores["blocks.0.mlp.hook_post"], expected.scores["blocks.0.mlp.hook_post"])


def test_a_model_as_source_runs_the_clean_prompts_only():
    ours, theirs = make_both("rotary")
    model, prompts, noise = ours
    found = patching.sweep(model, prompts, noise, ENDS, METRIC, source=model, progress=False)
    assert_same(found.per_pair, patching.sweep(*theirs, ENDS, METRIC, progress=False).per_pair)
    with pytest.raises(InputError, match="noise on this model's embeddings"):
        patching.sweep(model, prompts, noise, ENDS, METRIC, source=model, direction="noise", progress=False)


def test_draws_of_one_prompt_are_never_on_both_sides_of_a_split():
    """A circuit would be measured on prompts that it was found on."""
    (model, prompts, noise), _ = make_both("rotary", lengths=(6, 6, 6, 6))
    found = patching.held_out_curve(model, prompts, noise, METRIC, random_draws=0, sizes=[5], progress=False)
    for rows in (found.discovery_rows, found.evaluation_rows):
        assert [row // 2 for row in rows[::2]] == [row // 2 for row in rows[1::2]]
    learned = patching.learn_circuit(
        model, prompts, noise, METRIC, target_size=20, steps=2, holdout=0.5, progress=False
    )
    assert learned.held_out.per_pair.shape[-1] == 4
    with pytest.raises(InputError, match="no Pair can hold it"):
        patching.split_pairs(model, prompts, noise)
    with pytest.raises(InputError, match="nothing is resampled"):
        patching.fit_optimal_ablation(model, prompts, noise, patching.Circuit([]), METRIC, steps=1, progress=False)
