"""Estimates on edited models: gradients are those of a plain edited forward."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hooklens import patching
from hooklens.errors import EditError, InputError
from hooklens.hooks import edits
from hooklens.patching import LogitDiff
from tests.model.networks import make_model, pad_rows
from tests.patching.edited_reference import WIDTH, edits_of, logits_under
from tests.patching.naive import cell_index
from tests.patching.test_edited_models import make_pairs, seed_of

NETWORKS = ["grouped", "rotary", "shared norm", "learned, tied"]
MODELS = {network: make_model(network) for network in NETWORKS}
METRIC = LogitDiff(3, 5, pos=[-1, 1])
SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.attn.hook_z"]
SITES += ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_k", "ln_final.hook_normalized", "hook_embed"]


def effect_by_autograd(model, from_tokens, into_tokens, cell, made, pair):
    """The metric, and the sum of change times gradient over one cell, in one plain forward of the edited model."""
    name, index = cell["site"], cell_index(cell, cell["site"])
    taken = {}
    logits_under(model, from_tokens, made, pair, [edits.Custom(name, lambda t: taken.setdefault("new", t.clone()))])

    def leave(tensor):
        taken["old"] = tensor.detach().requires_grad_()
        return taken["old"]

    standing = [one for each in made if (one := each.alone(pair, len(into_tokens))) is not None]
    with torch.enable_grad():
        logits = model.run_with_hooks(into_tokens[None], edits=[*standing, edits.Custom(name, leave)])
        value = METRIC(logits)[0]
        [gradient] = torch.autograd.grad(value, taken["old"], allow_unused=True)
    change = torch.zeros_like(taken["new"]) if gradient is None else (taken["new"] - taken["old"].detach()) * gradient
    return value.detach() + change[index].sum()


@pytest.mark.parametrize("n_examples", [6, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", NETWORKS)
def test_attribution_is_the_gradient_of_the_edited_model(network, n_examples):
    model = MODELS[network]

    @seed_of(network)
    @settings(max_examples=n_examples)
    @given(st.data())
    def check(data):
        lengths = data.draw(st.sampled_from([(WIDTH,), (WIDTH, 4)]))
        kinds = ["Replace", "Add", "Scale", "Zero", "Project", "Mean", "Custom"]
        made = [data.draw(edits_of(model, lengths, kinds)) for _ in range(data.draw(st.integers(1, 2)))]
        site = data.draw(st.sampled_from(SITES))
        cleans, corrupteds = make_pairs(lengths)
        for pair, both in enumerate(zip(cleans, corrupteds, strict=True)):
            for tokens in both:
                assume(bool(logits_under(model, tokens, made, pair).isfinite().all()))
        (clean, mask), (corrupted, _) = pad_rows(cleans, "right"), pad_rows(corrupteds, "right")
        result = patching.attribution(
            model,
            clean,
            corrupted,
            patching.grid(site, positions=data.draw(st.sampled_from(["all", [-1, 1]]))),
            METRIC,
            rules="gradient",
            attention_mask=mask,
            edits=[one.edit for one in made],
            progress=False,
        )
        values = result.per_pair.reshape(-1, len(lengths))
        for pair in range(len(lengths)):
            for cell, value in list(zip(result.cells, values[:, pair], strict=True))[:3]:
                expected = effect_by_autograd(model, cleans[pair], corrupteds[pair], cell, made, pair)
                # float64 rounding through two layers and back.
                assert abs(value - expected) <= 1e-9 * (1 + abs(expected)), (cell, pair, value, expected)

    check()


def test_a_check_runs_the_edited_model():
    """The exact effects that an estimate is held against are those of a sweep with the same edits."""
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    arguments = (model, torch.stack(cleans), torch.stack(corrupteds), "mlp_out", METRIC)
    edit = edits.Zero("blocks.0.attn.hook_z", head=1)
    check = patching.attribution(*arguments, edits=[edit], progress=False).check(None, progress=False)
    swept = patching.sweep(*arguments, edits=[edit], progress=False)
    by_cell = {str(cell): value for cell, value in zip(swept.cells, swept.values.flatten(), strict=True)}
    expected = torch.stack([by_cell[str(cell)] for cell in check.cells]) - swept.base_per_pair.mean()
    torch.testing.assert_close(check.exact, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["eap", "eap-ig-activations", "exact"])
def test_edges_of_an_ablated_head_have_no_effect(method):
    model = MODELS["rotary"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    arguments = (model, torch.stack(cleans), torch.stack(corrupteds), METRIC)
    edit = edits.Zero("blocks.0.attn.hook_z", head=1)
    scores = patching.edge_attribution(*arguments, method=method, edits=[edit], progress=False)
    of_head = scores.scores[scores.writers.index("a0.h1")]
    assert float(of_head.abs().max()) < 1e-12
    plain = patching.edge_attribution(*arguments, method=method, progress=False)
    assert float(plain.scores[plain.writers.index("a0.h1")].abs().max()) > 1e-3


def test_edge_scores_are_first_order_effects_in_the_edited_model():
    """The score of an edge against autograd: the head's change times the gradient at what the logits read."""
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH,))
    standing = [edits.Scale("blocks.1.mlp.hook_post", 0.5), edits.Add("blocks.1.hook_resid_pre", 0.3, pos=[1, -1])]
    scores = patching.edge_attribution(
        model, cleans[0][None], corrupteds[0][None], METRIC, rules="gradient", edits=standing, progress=False
    )
    outputs = []
    for tokens in (cleans[0], corrupteds[0]):
        _, cache = model.run_with_cache(tokens[None], names_filter="blocks.0.hook_mlp_out", edits=standing)
        outputs.append(cache["blocks.0.hook_mlp_out"].detach())
    kept = {}

    def leave(tensor):
        kept["stream"] = tensor.detach().requires_grad_()
        return kept["stream"]

    last = "blocks.1.hook_resid_post"
    value = METRIC(model.run_with_hooks(cleans[0][None], edits=[*standing, edits.Custom(last, leave)]))[0]
    [gradient] = torch.autograd.grad(value, kept["stream"])
    expected = ((outputs[1] - outputs[0]) * gradient).sum()
    found = scores.scores[scores.writers.index("m0"), scores.readers.index("logits")]
    assert abs(found - expected) < 1e-9


def test_what_cannot_be_estimated_is_refused():
    model = MODELS["grouped"]
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    clean, corrupted = torch.stack(cleans), torch.stack(corrupteds)
    edit = edits.Zero("blocks.0.attn.hook_z", head=1)
    with pytest.raises(InputError, match=r"attribution: rules=.*a second time"):
        patching.attribution(model, clean, corrupted, "q", METRIC, rules="atp*", edits=[edit], progress=False)
    with pytest.raises(InputError, match=r"edge_attribution: rules=.*a second time"):
        patching.edge_attribution(model, clean, corrupted, METRIC, rules="atp*", edits=[edit], progress=False)
    with pytest.raises(EditError, match="stand between nodes"):
        patching.edge_attribution(
            model, clean, corrupted, METRIC, edits=[edits.Zero("blocks.1.hook_resid_pre")], progress=False
        )
    with pytest.raises(InputError, match=r"sees all pairs at once.*functions \(Custom\)"):
        patching.attribution(
            model,
            clean,
            corrupted,
            "z",
            lambda logits: logits[:, -1, 3],
            edits=[edits.Custom("blocks.0.hook_mlp_out", torch.sin)],
            progress=False,
        )
