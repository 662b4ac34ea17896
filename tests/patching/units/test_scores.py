import pytest
import torch

from hooklens import patching
from hooklens.errors import HookLensError, InputError
from hooklens.patching import LogitDiff, LogProb, UnitCircuit, evaluate_units, score_units
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
NAMES = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff([3, 4, 5], [6, 7, 8])


def score(metric=METRIC, names=NAMES, **options):
    return score_units(MODEL, CLEAN, CORRUPTED, names, metric, **{"progress": False, **options})


def value(logits):
    rows = torch.arange(3)
    return logits[rows, -1, rows + 3] - logits[rows, -1, rows + 6]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_estimates_are_the_derivative_along_the_ablation(frozen, batch_size):
    """Units go a small step of the way, each alone; the metric moves by as much of the score."""
    for parameter in MODEL.parameters():
        parameter.requires_grad_(not frozen)
    found = score(batch_size=batch_size)
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    for parameter in MODEL.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        _, other = MODEL.run_with_cache(CORRUPTED, names_filter=NAMES)
        side = float((value(MODEL(CLEAN)) - value(MODEL(CORRUPTED))).mean())
        for name, entry in ((NAMES[0], 0), (NAMES[0], 13), (NAMES[1], 19)):
            ends = []
            for step in (1e-5, -1e-5):

                def move(tensor, hook, step=step, entry=entry):
                    new = tensor.clone()
                    new[..., entry] += step * (tensor - other[hook.name])[..., entry]
                    return new

                ends.append(float(value(MODEL.run_with_hooks(CLEAN, fwd_hooks=[(name, move)])).mean()))
            slope = (ends[0] - ends[1]) / 2e-5
            assert found[name, entry] == pytest.approx(slope * (1 if side > 0 else -1), abs=1e-7)


def test_exact_scores_are_what_one_ablated_unit_changes():
    found = score(method="exact", ablation="zero")
    for name, entry in ((NAMES[0], 4), (NAMES[1], 0)):
        kept = {other: [one for one in range(20) if (other, one) != (name, entry)] for other in NAMES}
        alone = evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit(kept)], METRIC, ablation="zero", progress=False)
        with torch.no_grad():
            side = float((value(MODEL(CLEAN)) - value(MODEL(CORRUPTED))).mean())
        expected = (alone.full - float(alone.values[0])) * (1 if side > 0 else -1)
        assert found[name, entry] == pytest.approx(expected, abs=1e-9)
    assert (found.method, found.ablation, len(found)) == ("exact", "zero", 40)


def test_estimates_are_exact_where_the_rest_is_linear():
    """The last MLP's output reaches a difference of logits of a network without a final norm by a matrix."""
    model = make_model("attention only")
    linear = ["blocks.1.hook_attn_out"]
    options = {"progress": False}
    estimate = score_units(model, CLEAN, CORRUPTED, linear, METRIC, **options)
    exact = score_units(model, CLEAN, CORRUPTED, linear, METRIC, method="exact", **options)
    torch.testing.assert_close(estimate.scores[linear[0]], exact.scores[linear[0]], rtol=0, atol=1e-9)


def test_better_units_keep_more():
    scores = score(method="exact")
    circuits = {"best": scores.circuit(20), "random": scores.random_circuit(20, seed=1)}
    found = evaluate_units(MODEL, CLEAN, CORRUPTED, circuits, METRIC, progress=False)
    away = (found.faithfulness_hanna - 1).abs().tolist()
    assert away[0] < away[1]


def test_scores_of_nodes_are_those_of_their_edges():
    """A whole node's score by a gradient is the sum over the edges that leave it: the stream is a sum."""
    found = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, rules="gradient", progress=False)
    for layer in (0, 1):
        name = f"blocks.{layer}.hook_mlp_out"
        units = score(names=[name]).scores[name]
        assert found.edges.node_scores[f"m{layer}"] == pytest.approx(float(units.sum()), abs=1e-10)


def test_circuits_of_nodes_ablate_all_others():
    edges = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, progress=False).edges
    circuit = edges.node_circuit(3)
    nodes = circuit.nodes()[:-1]
    ranked = sorted(edges.node_scores, key=lambda name: abs(edges.node_scores[name]), reverse=True)
    assert set(nodes) == set(ranked[:3])
    assert circuit == patching.Circuit.of_nodes(MODEL.cfg, nodes)
    # Keeping all but an MLP is ablating that MLP's output.
    others = [name for name in edges.writers if name != "m1"]
    kept = patching.Circuit.of_nodes(MODEL.cfg, others)
    found = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [kept], METRIC, progress=False)
    units = evaluate_units(
        MODEL, CLEAN, CORRUPTED, [UnitCircuit({"blocks.1.hook_mlp_out": []})], METRIC, progress=False
    )
    torch.testing.assert_close(found.per_pair, units.per_pair, rtol=0, atol=1e-10)


RULES = ["gradient", "norms", "linear", "relp", "gim", "atp*", [patching.HoldPattern()]]


@pytest.mark.parametrize("network", ["grouped", "rotary", "shared norm", "learned, tied"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_units_of_a_point_have_its_effect_by_the_same_rules(network, rules):
    """The units' scores of one hook point add up to what attribution says of a patch of the whole of it."""
    model = make_model(network)
    name = "blocks.0.mlp.hook_post"
    whole = patching.attribution(model, CLEAN, CORRUPTED, name, METRIC, rules=rules, direction="noise", progress=False)
    found = score_units(model, CLEAN, CORRUPTED, [name], METRIC, rules=rules, progress=False)
    assert found.rules == whole.rules
    drops = rules == "atp*"
    side = 1 if float((whole.clean_per_pair - whole.corrupted_per_pair).mean()) > 0 else -1
    if not drops:
        # Magnitudes, which dropping layers averages, do not add up.
        assert float(found.scores[name].sum()) == pytest.approx(-side * float(whole.effects.sum()), abs=1e-10)
    else:
        plain = score_units(model, CLEAN, CORRUPTED, [name], METRIC, progress=False)
        assert not torch.allclose(found.scores[name], plain.scores[name])


def test_dropped_layers_are_averaged_by_magnitude_for_each_pair():
    """By hand: the gradient with one layer's outputs cut out of the graph at a time."""
    name = "blocks.0.mlp.hook_post"
    found = score_units(MODEL, CLEAN, CORRUPTED, [name], METRIC, rules="atp*", progress=False).scores[name]
    with torch.no_grad():
        own, other = (MODEL.run_with_cache(tokens, names_filter=[name])[1][name] for tokens in (CLEAN, CORRUPTED))
        side = 1 if float((value(MODEL(CLEAN)) - value(MODEL(CORRUPTED))).mean()) > 0 else -1

    def effects(cut):
        leaf = own.clone().requires_grad_()
        hooks = [(name, lambda tensor, hook: leaf)]
        hooks += [(point, lambda tensor, hook: tensor.detach()) for point in cut]
        [gradient] = torch.autograd.grad(value(MODEL.run_with_hooks(CLEAN, fwd_hooks=hooks)).sum(), leaf)
        return ((own - other) * gradient).sum(1)

    plain = effects([])
    dropped = [effects([f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]) for layer in (1,)]
    # Without its own layer nothing of a unit is left.
    magnitude = torch.stack([torch.zeros_like(plain), *(one.abs() for one in dropped)]).sum(0)
    expected = side * torch.where(plain < 0, -magnitude, magnitude).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_refusals():
    with unchecked(), pytest.raises(InputError, match="score_units: names are 'mlp_post'; expected a list"):
        score(names="mlp_post")
    with unchecked(), pytest.raises(InputError, match="score_units: method is 'ig'"):
        score(method="ig")
    with pytest.raises(InputError, match="method='exact' takes no gradients, so rules= says nothing"):
        score(method="exact", rules="norms")
    with unchecked(), pytest.raises(InputError, match="score_units: rules is 'best'; expected one of 'gradient'"):
        score(rules="best")
    same = score_units
    with pytest.raises(HookLensError, match="the clean and the corrupted run have the same LogProb"):
        same(MODEL, CLEAN, CLEAN, NAMES, LogProb(3), progress=False)
