"""Experiments on edited models: every patched run is one full forward of one prompt with the same edits."""

import zlib

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from hooklens import patching
from hooklens.axes import EMBEDDINGS, is_below_blocks, layer_of
from hooklens.patching import LogitDiff
from tests.model.networks import CONFIGS, PARTIAL_CONFIGS, activations_of, make_model, pad_rows, random_tokens
from tests.patching.edited_reference import WIDTH, edits_of, logits_under, patch_in_full

PLANNED = ("Replace", "Add", "Scale", "Zero", "Project", "Mean")
METRIC = LogitDiff(3, 5)
# float64 rounding through two layers, far below any real difference.
TOLERANCE = 1e-10
MODELS = {name: make_model(name) for name in (*CONFIGS, *PARTIAL_CONFIGS)}


def make_pairs(lengths, *, n_shared=2):
    """Pairs of prompts as single rows."""
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(len(lengths), WIDTH, seed=seed).split(1), lengths, strict=True)]
        for seed in (1, 2)
    ]
    for clean, corrupted in zip(*rows, strict=True):
        corrupted[:n_shared] = clean[:n_shared]
    return rows


@st.composite
def grids_of(draw, model, *, same_length):
    sites = [name for name in activations_of(model) if not is_below_blocks(name) or name in EMBEDDINGS]
    site = draw(st.sampled_from(sites))
    positions = draw(st.sampled_from(["all", -1, [0, -2], [1, 3], *(["each"] if same_length else [])]))
    sources = "all"
    if site.endswith(("pattern", "attn_scores")):
        sources = draw(st.sampled_from(["all", 0, [1, -1]]))
    return patching.grid(site, positions=positions, heads=draw(st.sampled_from(["each", "all"])), sources=sources)


LENGTHS = [(WIDTH,), (WIDTH, WIDTH), (WIDTH, 4, 5)]


def names_close_to(model, site):
    """Hook points at which an edit meets a patch: its own, and those between it and what goes on from it."""
    layer = layer_of(site)
    if layer is None:
        words = ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "ln_final.hook_normalized"]
        return [site, *(name for name in [*words, "unembed.hook_in", "unembed.hook_out"] if name in MODELS_HAVE[model])]
    words = ["resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
    close = [site, f"blocks.{layer + 1}.hook_resid_pre", *(f"blocks.{layer}.hook_{word}" for word in words)]
    close += [f"blocks.{layer}.attn.hook_{word}" for word in ("k", "k_per_head", "z", "result", "pattern")]
    return [name for name in close if name in MODELS_HAVE[model]]


MODELS_HAVE = {model: set(activations_of(model)) for model in MODELS.values()}


@st.composite
def experiments(draw, network, kinds):
    model = MODELS[network]
    lengths = draw(st.sampled_from(LENGTHS))
    grid = draw(grids_of(model, same_length=len(set(lengths)) == 1))
    close = names_close_to(model, grid.site)
    made = [draw(edits_of(model, lengths, kinds, close))]
    if draw(st.booleans()):
        made.append(draw(edits_of(model, lengths, kinds, draw(st.sampled_from([close, None])))))
    return {
        "network": network,
        "lengths": lengths,
        "grid": grid,
        "made": made,
        "direction": draw(st.sampled_from(["denoise", "noise"])),
        "batch_size": draw(st.sampled_from(["auto", 1, 5])),
        "side": draw(st.sampled_from(["left", "right"])),
        "metric": LogitDiff(3, 5, pos=draw(st.sampled_from([-1, -2, [1, -1], None]))),
    }


def assert_edited(drawn, *, n_cells=3):
    model, lengths, metric = MODELS[drawn["network"]], drawn["lengths"], drawn["metric"]
    cleans, corrupteds = make_pairs(lengths)
    (clean, mask), (corrupted, _) = pad_rows(cleans, drawn["side"]), pad_rows(corrupteds, drawn["side"])
    # Norms divide by what an edit has made 0, and masked scores are infinite.
    for pair, both in enumerate(zip(cleans, corrupteds, strict=True)):
        for tokens in both:
            assume(bool(logits_under(model, tokens, drawn["made"], pair).isfinite().all()))
    result = patching.sweep(
        model,
        clean,
        corrupted,
        drawn["grid"],
        metric,
        attention_mask=mask,
        edits=[one.edit for one in drawn["made"]],
        direction=drawn["direction"],
        batch_size=drawn["batch_size"],
        progress=False,
    )
    values = result.per_pair.reshape(-1, len(lengths))
    step = max(1, len(values) // n_cells)
    for pair in range(len(lengths)):
        ends = (cleans[pair], corrupteds[pair])
        source, into = ends if drawn["direction"] == "denoise" else ends[::-1]
        for cell, value in list(zip(result.cells, values[:, pair], strict=True))[::step]:
            expected = metric(patch_in_full(model, source, into, cell, drawn["made"], pair))[0]
            assert abs(value - expected) <= TOLERANCE * (1 + abs(expected)), (cell, pair, value, expected)
    return result


def seed_of(text):
    """One for each text, so that networks do not all have the same examples."""
    return seed(zlib.crc32(text.encode()))


@pytest.mark.parametrize("network", MODELS)
def test_planned_sweeps_equal_one_full_forward_per_cell(network):
    @seed_of(network)
    @settings(max_examples=40)
    @given(experiments(network, PLANNED))
    def check(drawn):
        assert_edited(drawn)

    check()


@pytest.mark.parametrize("network", ["rotary", "grouped", "shared norm", "capped"])
def test_functions_of_ones_own_take_one_full_forward_per_cell(network):
    @seed_of(network)
    @settings(max_examples=15)
    @given(experiments(network, ("Custom", "Mean", "Add")))
    def check(drawn):
        result = assert_edited(drawn, n_cells=2)
        if any(type(one.edit).__name__ == "Custom" for one in drawn["made"]):
            assert result.stats.unplanned == result.stats.cells * result.stats.pairs

    check()
