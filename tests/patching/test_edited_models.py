"""Experiments on edited models: every patched run is one full forward of one prompt with the same edits."""

import zlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from hooklens import HookedCausalLM, patching
from hooklens.axes import EMBEDDINGS, is_below_blocks, layer_of
from hooklens.errors import EditError, HookNameError, InputError
from hooklens.hooks import edits
from hooklens.patching import LogitDiff
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, PARTIAL_CONFIGS, activations_of, make_model, pad_rows, random_tokens
from tests.patching.edited_reference import WIDTH, Made, edits_of, logits_under, patch_in_full

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


# Networks whose parts meet in most ways have more examples.
MANY = ("grouped", "alibi, grouped", "capped", "latent attention")


@pytest.mark.parametrize(
    ("network", "n_examples"),
    [
        *((network, 15 if network in MANY else 6) for network in MODELS),
        *(pytest.param(network, 80, marks=pytest.mark.slow) for network in MODELS),
    ],
)
def test_planned_sweeps_equal_one_full_forward_per_cell(network, n_examples):
    @seed_of(network)
    @settings(max_examples=n_examples)
    @given(experiments(network, PLANNED))
    def check(drawn):
        assert_edited(drawn)

    check()


@pytest.mark.parametrize("n_examples", [4, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", ["rotary", "grouped", "shared norm", "capped"])
def test_functions_of_ones_own_take_one_full_forward_per_cell(network, n_examples):
    @seed_of(network)
    @settings(max_examples=n_examples)
    @given(experiments(network, ("Custom", "Mean", "Add")))
    def check(drawn):
        result = assert_edited(drawn, n_cells=2)
        if any(type(one.edit).__name__ == "Custom" for one in drawn["made"]):
            assert result.stats.unplanned == result.stats.cells * result.stats.pairs

    check()


@pytest.mark.parametrize("network", ["rotary", "shared norm", "grouped"])
def test_edits_between_a_patch_and_the_next_block_act_on_the_patch(network):
    """What is only added to the stream leaves its block out, but not where an edit would have acted in it."""
    model = MODELS[network]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    words = ("hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_result", "attn.hook_z", "attn.hook_v")
    for at in ("blocks.1.hook_resid_pre", *(f"blocks.0.{word}" for word in words)):
        edit = edits.Scale(at, -2.0, pos=[1, -1])
        made = [Made(edit, lambda pair, length, edit=edit: edit)]
        sites = [
            patching.grid(word, layers=0, positions=[-1, 1], heads=[0, 2] if word == "z" else "each")
            for word in ("mlp_out", "attn_out", "z", "resid_post")
        ]
        sites.append(patching.grid("hook_embed", positions=[-1]))
        result = patching.sweep(
            model, torch.stack(cleans), torch.stack(corrupteds), sites, METRIC, edits=[edit], progress=False
        )
        for cell, value in zip(result.cells, result.per_pair[..., 1], strict=True):
            expected = METRIC(patch_in_full(model, cleans[1], corrupteds[1], cell, made, 1))[0]
            assert abs(value - expected) <= TOLERANCE * (1 + abs(expected)), (edit, cell)


@pytest.mark.parametrize("network", ["grouped", "alibi, grouped"])
@pytest.mark.parametrize(
    "edit",
    [
        edits.Add("blocks.0.attn.hook_pattern", 0.7),
        edits.Replace("blocks.1.attn.hook_attn_scores", 0.5, head=[0, 2]),
        edits.Mean("blocks.0.hook_mlp_out"),
        edits.Scale("blocks.1.attn.hook_k_per_head", -2.0, head=1),
    ],
    ids=lambda edit: edit.name,
)
def test_edits_that_let_tokens_read_more_are_computed_in_whole_rows(network, edit):
    """Tokens in front of a patch feel it, too, and keys of single heads are in no cache.

    Drawn edits of patterns show that they look ahead in one of some forty examples.
    """
    model = MODELS[network]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    made = [Made(edit, lambda pair, length: edit)]
    sites = [patching.grid(word, positions=[2, -1]) for word in ("resid_pre", "attn_out", "mlp_out")]
    metric = LogitDiff(3, 5, pos=[1, -1])
    result = patching.sweep(
        model, torch.stack(cleans), torch.stack(corrupteds), sites, metric, edits=[edit], progress=False
    )
    for cell, value in zip(result.cells, result.per_pair[..., 1], strict=True):
        expected = metric(patch_in_full(model, cleans[1], corrupteds[1], cell, made, 1))[0]
        assert abs(value - expected) <= TOLERANCE * (1 + abs(expected)), cell


def test_one_column_of_the_last_block_keeps_its_cells_and_pairs_apart():
    """Values of other cells and pairs, silently, where several of both were patched late in the last block."""
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    sites = [patching.grid(word, layers=1, positions=-1) for word in ("mlp_in", "resid_mid")]
    result = patching.sweep(model, torch.stack(cleans), torch.stack(corrupteds), sites, METRIC, progress=False)
    for cell, values in zip(result.cells, result.per_pair, strict=True):
        expected = [METRIC(patch_in_full(model, cleans[i], corrupteds[i], cell, [], i))[0] for i in range(2)]
        torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=TOLERANCE)


def test_the_edited_runs_are_what_is_compared_with():
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, 4))
    (clean, mask), (corrupted, _) = pad_rows(cleans, "right"), pad_rows(corrupteds, "right")
    edit = edits.Zero("blocks.0.attn.hook_z", head=1, pos=-1, rows=1)
    result = patching.sweep(model, clean, corrupted, "z", METRIC, attention_mask=mask, edits=[edit], progress=False)
    for pair in range(2):
        own = [edits.Zero("blocks.0.attn.hook_z", head=1, pos=-1)] if pair == 1 else []
        for ends, tokens in ((result.clean_per_pair, cleans), (result.corrupted_per_pair, corrupteds)):
            expected = METRIC(model.run_with_hooks(tokens[pair][None], edits=own))[0]
            assert abs(ends[pair] - expected) < TOLERANCE


def test_without_edits_nothing_changes():
    """Bit for bit, with as many forwards."""
    model = make_model("grouped", dtype=torch.float32)
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    arguments = (model, torch.stack(cleans), torch.stack(corrupteds), ["z", "resid_pre", "pattern"], METRIC)
    without = patching.sweep(*arguments, progress=False)
    empty = patching.sweep(*arguments, edits=[], progress=False)
    assert torch.equal(empty.per_pair, without.per_pair)
    assert empty.stats == without.stats


def test_planned_edits_cost_no_full_forwards():
    """Late starts and packed rows stay where an edit changes single tokens."""
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    arguments = (model, torch.stack(cleans), torch.stack(corrupteds), patching.grid("resid_pre"), METRIC)
    plain = patching.sweep(*arguments, progress=False).stats
    ablated = patching.sweep(*arguments, edits=[edits.Zero("z", head=0)], progress=False).stats
    assert (ablated.forwards, ablated.tokens, ablated.unplanned) == (plain.forwards, plain.tokens, 0)


def test_what_does_not_fit_is_refused_before_anything_runs():
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, 4))
    (clean, mask), (corrupted, _) = pad_rows(cleans, "right"), pad_rows(corrupteds, "right")
    seen = []

    def refuse(error, text, given, pairs=(clean, corrupted), **options):
        with model.hooks([("hook_embed", lambda tensor, hook: seen.append(1))]), pytest.raises(error, match=text):
            patching.sweep(model, *pairs, sites="z", metric=METRIC, edits=given, progress=False, **options)
        assert not seen

    padded = {"attention_mask": mask}
    with unchecked():
        refuse(InputError, r"edits is .*\[edit\] for a single one", edits.Zero("z"), **padded)
    refuse(HookNameError, "nope.*nope2", [edits.Zero("nope"), edits.Zero("nope2")], **padded)
    refuse(EditError, "generated tokens only", [edits.Zero("z", when="decode")], **padded)
    refuse(EditError, "rows.*2 out of range; there are 2 pairs", [edits.Zero("z", rows=2)], **padded)
    refuse(EditError, "pos.*5 out of range; there are 4 tokens in pair 1", [edits.Zero("z", pos=5)], **padded)
    refuse(EditError, "other numbers of keys", [edits.Project("pattern", torch.ones(6))], **padded)
    loader = ({"clean": clean[:1], "corrupted": corrupted[:1]} for _ in range(2))
    refuse(EditError, "rows, which are pairs of the experiment.*from a loader", [edits.Zero("z", rows=0)], (loader,))


def test_values_that_do_not_fit_are_refused():
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    for value, text in ((torch.zeros(3, 7).double(), "the value has shape"), (torch.zeros(12), "torch.float32")):
        with pytest.raises(EditError, match=text):
            patching.sweep(
                model,
                torch.stack(cleans),
                torch.stack(corrupteds),
                "z",
                METRIC,
                edits=[edits.Add("blocks.0.hook_resid_pre", value)],
                progress=False,
            )
    with pytest.raises(EditError, match=r"3 rows; expected one for each pair that it chooses \(2\)"):
        patching.sweep(
            model,
            torch.stack(cleans),
            torch.stack(corrupteds),
            "z",
            METRIC,
            edits=[edits.Add("blocks.0.hook_resid_pre", torch.zeros(3, WIDTH, 12).double())],
            progress=False,
        )


def test_the_tokens_themselves_can_be_edited():
    model = MODELS["rotary"]
    cleans, corrupteds = make_pairs((WIDTH,))
    edit = edits.Replace("hook_tokens", 7, pos=1)
    result = patching.sweep(
        model, cleans[0][None], corrupteds[0][None], "mlp_out", METRIC, edits=[edit], progress=False
    )
    swapped = [tokens.clone() for tokens in (cleans[0], corrupteds[0])]
    for tokens in swapped:
        tokens[1] = 7
    expected = patching.sweep(model, swapped[0][None], swapped[1][None], "mlp_out", METRIC, progress=False)
    torch.testing.assert_close(result.per_pair, expected.per_pair, rtol=0, atol=TOLERANCE)


def test_kinds_of_ones_own_say_how_far_they_reach():
    """A kind that computes otherwise than its base is not planned by what the base says of itself."""

    @dataclass(frozen=True)
    class Double(edits.Scale):
        pass

    @dataclass(frozen=True)
    class Shifted(edits.Scale):
        def compute(self, region, region_axes, selection):
            return region.roll(1, 0)

    @dataclass(frozen=True)
    class Halved(edits.Edit):
        reach = "token"

        def compute(self, region, region_axes, selection):
            return region / 2

    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH,))
    unplanned = {}
    for edit in (Double("z", 2.0), Shifted("z", 2.0, pos=[1, 2]), Halved("z", pos=-1)):
        result = patching.sweep(
            model, cleans[0][None], corrupteds[0][None], "mlp_out", METRIC, edits=[edit], progress=False
        )
        unplanned[type(edit).__name__] = result.stats.unplanned
        for cell, value in zip(result.cells, result.per_pair.flatten(), strict=True):
            made = [Made(edit, lambda pair, length, edit=edit: edit)]
            expected = METRIC(patch_in_full(model, cleans[0], corrupteds[0], cell, made, 0))[0]
            assert abs(value - expected) < TOLERANCE
    assert unplanned == {"Double": 0, "Shifted": result.stats.cells, "Halved": 0}


def test_no_head_of_a_small_model_takes_over_from_those_that_move_names():
    """Self-repair, measured: this model does it with heads of its last block, and nothing backs them up."""
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    text = "When {a} and {b} went to the store, {c} gave a drink to"
    pairs = [
        patching.Pair.from_text(
            model, text.format(a=a, b=b, c=b), text.format(a=a, b=b, c=a), answer=f" {a}", wrong=f" {b}"
        )
        for a, b in (("Mary", "John"), ("Anna", "Tom"), ("Lucy", "Peter"))
    ]
    movers = [edits.Zero("blocks.3.attn.hook_z", head=[2, 3], pos=-1)]
    grid = patching.grid("z", positions=-1)
    plain = patching.sweep(model, pairs, sites=grid, metric=LogitDiff(), progress=False)
    ablated = patching.sweep(model, pairs, sites=grid, metric=LogitDiff(), edits=movers, progress=False)
    before, after = (result.values[:, 0] - result.corrupted for result in (plain, ablated))
    assert before[3, 3] > 10
    assert ablated.clean < 0.2 * plain.clean
    # What is put in comes from an edited run, so that patches of the ablated heads change nothing.
    assert bool((after[3, 2:] == 0).all())
    assert after.abs().max() < 1
