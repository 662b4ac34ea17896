"""Circuits of edited models: every masked run is the reference's, one full forward per node, with the same edits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import patching
from hooklens.errors import EditError
from hooklens.hooks import edits
from hooklens.patching import KL, Circuit, LogitDiff, LogProb, MetricError
from hooklens.patching.graph.nodes import list_edges
from tests.annotations import unchecked
from tests.model.networks import activations_of, make_model, random_tokens
from tests.patching.edited_reference import WIDTH, edits_of
from tests.patching.masked_reference import MaskedReference
from tests.patching.test_edited_models import seed_of

NETWORKS = ["grouped", "rotary", "shared norm", "alibi, grouped", "learned, tied", "bare", "attention only"]
MODELS = {network: make_model(network) for network in NETWORKS}
METRIC = LogProb(4, pos=[0, 2, 3, -1])
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out")


def prompts_of(n):
    clean, corrupted = random_tokens(n, WIDTH, seed=1), random_tokens(n, WIDTH, seed=2)
    corrupted[:, :2] = clean[:, :2]
    return clean, corrupted


def names_of_nodes(model):
    left_out = ("hook_attn_scores", "_input", "hook_attn_in", "hook_mlp_in", "hook_scale")
    names = [name for name in activations_of(model) if not name.endswith(left_out) and ".ln1." not in name]
    return [name for name in names if not name.endswith(STREAM) or name == "blocks.0.hook_resid_pre"]


@st.composite
def drawn_edits(draw, model, n_pairs):
    kinds = ["Replace", "Add", "Scale", "Project", *(["Mean"] if n_pairs == 1 else [])]
    lengths = (WIDTH,) * n_pairs
    made = [draw(edits_of(model, lengths, kinds, names_of_nodes(model)))]
    made = [one for one in made if not (type(one.edit) is edits.Mean and not one.edit.name.startswith("blocks"))]
    if draw(st.booleans()) or not made:
        names = [name for name in activations_of(model) if name.endswith(STREAM)]
        made.append(draw(edits_of(model, lengths, ["Add"], names)))
    return [one.edit for one in made]


def draw_circuit(data, model):
    chosen_edges = list_edges(model.cfg)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    kept = torch.rand(len(chosen_edges), generator=generator) < data.draw(st.sampled_from([0.3, 0.7, 0.95]))
    return Circuit(edge for edge, keep in zip(chosen_edges, kept, strict=True) if keep)


@pytest.mark.parametrize("n_examples", [2, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", NETWORKS)
def test_circuits_of_edited_models_equal_the_reference(network, n_examples):
    model = MODELS[network]

    @seed_of(network)
    @settings(max_examples=n_examples)
    @given(st.data())
    def check(data):
        n_pairs = data.draw(st.sampled_from([1, 2]))
        clean, corrupted = prompts_of(n_pairs)
        given_edits = data.draw(drawn_edits(model, n_pairs))
        ablation = data.draw(st.sampled_from(["resample", "mean", "zero"]))
        circuits = [draw_circuit(data, model), Circuit.full(model.cfg), Circuit()]
        options = {"ablation": ablation, "edits": given_edits, "batch_size": data.draw(st.sampled_from(["auto", 1]))}
        result = patching.evaluate_circuits(model, clean, corrupted, circuits, METRIC, progress=False, **options)
        reference = MaskedReference(model, clean, corrupted, ablation, given_edits)
        for circuit, values in zip(circuits, result.per_pair, strict=True):
            # Sums of some twenty terms in another order, in float64.
            torch.testing.assert_close(values, METRIC(reference.logits(circuit)), rtol=0, atol=1e-9)
        plain = METRIC(model.run_with_hooks(clean, edits=given_edits))
        torch.testing.assert_close(result.full_per_pair, plain, rtol=0, atol=1e-10)

    check()


def test_edits_between_nodes_and_functions_are_refused():
    model = MODELS["grouped"]
    clean, corrupted = prompts_of(1)
    for edit, text in (
        (edits.Scale("blocks.1.hook_resid_pre", 0.5), r"at 'blocks.1.hook_resid_pre' stand between nodes"),
        (edits.Zero("blocks.0.hook_attn_out"), "stand between nodes"),
        (edits.Zero("blocks.1.hook_q_input"), "stand between nodes"),
        (edits.Custom("blocks.1.attn.hook_z", torch.sin), "not known what these edits read.*patching.sweep"),
        (edits.Zero("blocks.1.attn.hook_z", pos=9), "9 out of range"),
    ):
        with pytest.raises(EditError, match=text):
            patching.evaluate_circuits(model, clean, corrupted, [Circuit()], METRIC, edits=[edit], progress=False)
        with pytest.raises(EditError, match=text):
            patching.discover_circuit(model, clean, corrupted, threshold=0.1, edits=[edit], progress=False)


def test_a_search_is_that_of_the_edited_model():
    """An ablated head has no part in what is found, and its damage is none."""
    model = MODELS["rotary"]
    clean, corrupted = prompts_of(2)
    dead = edits.Zero("blocks.1.attn.hook_z", head=2)
    found = patching.discover_circuit(model, clean, corrupted, threshold=1e-6, edits=[dead], progress=False)
    assert not [edge for edge in found.circuit.edges if edge[0] == "a1.h2"]
    plain = patching.discover_circuit(model, clean, corrupted, threshold=1e-6, progress=False)
    assert [edge for edge in plain.circuit.edges if edge[0] == "a1.h2"]


def test_several_metrics_are_those_measured_alone():
    model = MODELS["grouped"]
    clean, corrupted = prompts_of(3)
    circuits = {"none": Circuit(), "all": Circuit.full(model.cfg)}
    metrics = {"difference": LogitDiff(3, 5), "shift": KL(), "all positions": LogProb(4, pos=None)}
    together = patching.evaluate_circuits(model, clean, corrupted, circuits, metrics, progress=False)
    for name, metric in metrics.items():
        alone = patching.evaluate_circuits(model, clean, corrupted, circuits, metric, progress=False)
        for field in ("per_pair", "full_per_pair", "empty_per_pair"):
            # float64 rounding: more columns run where all positions are read.
            torch.testing.assert_close(getattr(together[name], field), getattr(alone, field), rtol=0, atol=1e-10)
        assert together[name].stats.forwards == alone.stats.forwards
    assert list(together.to_dataframe().columns[:3]) == ["circuit", "edges", "heads"]
    with unchecked(), pytest.raises(MetricError, match="decides every edge by one number"):
        patching.discover_circuit(model, clean, corrupted, metrics, threshold=0.1, progress=False)


def test_curves_of_edited_models_and_of_several_metrics():
    model = MODELS["rotary"]
    clean, corrupted = prompts_of(2)
    scores = patching.edge_attribution(model, clean, corrupted, LogitDiff(3, 5), progress=False)
    edit = edits.Scale("blocks.0.attn.hook_result", 0.5)
    metrics = {"difference": LogitDiff(3, 5), "shift": KL()}
    options = {"sizes": [1, 9], "edits": [edit], "progress": False}
    curves = patching.faithfulness_curve(model, clean, corrupted, scores, metrics, **options)
    alone = patching.faithfulness_curve(model, clean, corrupted, scores, LogitDiff(3, 5), **options)
    assert torch.equal(curves["difference"].result.per_pair, alone.result.per_pair)
    assert alone.result.metric == "LogitDiff"
    evaluated = patching.evaluate_circuits(
        model, clean, corrupted, list(alone.circuits), KL(), edits=[edit], progress=False
    )
    assert torch.equal(curves["shift"].result.per_pair, evaluated.per_pair)
