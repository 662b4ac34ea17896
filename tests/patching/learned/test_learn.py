import functools
import re

import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import HookLensError, InputError
from hooklens.patching import KL, Circuit, LogitDiff, MetricError, SweepInterruptedError
from hooklens.patching.graph.nodes import list_edges
from hooklens.patching.learned import training
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens
from tests.patching.learned.tasks import indirect_objects

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(8, 5, seed=1), random_tokens(8, 5, seed=2)
METRIC = LogitDiff(3, 5)


def learn(metric="kl", *, model=MODEL, **options):
    options = {"steps": 4, "progress": False, **options}
    if not {"target_size", "target_sparsity", "penalty"} & options.keys():
        options["target_size"] = 20
    return patching.learn_circuit(model, CLEAN, CORRUPTED, metric, **options)


@functools.cache
def bundled():
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    return model, indirect_objects(model, 8, seed=0), indirect_objects(model, 16, seed=1)


@functools.cache
def learned_on_bundled():
    model, pairs, _ = bundled()
    return patching.learn_circuit(model, pairs, target_size=12, steps=60, progress=False)


def test_a_circuit_of_few_edges_is_as_faithful_on_new_prompts_as_that_of_scores():
    model, pairs, others = bundled()
    found = learned_on_bundled()
    assert len(found.circuit()) == 12
    # Of draws of gates, not of the rounded circuit: some draws close what is needed.
    assert found.losses[-20:].median() < 0.001
    scores = patching.edge_attribution(model, pairs, metric=LogitDiff(), progress=False)
    random_edges = [
        list_edges(model.cfg)[i] for i in torch.randperm(343, generator=torch.Generator().manual_seed(0))[:12]
    ]
    circuits = {"learned": found.circuit(), "eap": scores.circuit(12), "random": Circuit(random_edges)}
    result = patching.evaluate_circuits(model, others, circuits=circuits, metric=KL(), progress=False)
    learned, greedy, by_chance = result.faithfulness_hanna.tolist()
    # Both keep all but a hundredth; what is left between them is noise of the prompts.
    assert learned > greedy - 0.01
    assert learned > 0.98
    assert by_chance < 0.3


@pytest.mark.parametrize("metric", ["kl", pytest.param(None, marks=pytest.mark.slow)])
def test_the_edges_of_a_known_circuit_have_the_gates_most_likely_open(metric):
    known = patching.known.induction(seed=0)
    found = patching.learn_circuit(
        known.model, known.pairs(12), metric=metric or known.metric, target_size=5, steps=80, progress=False
    )
    assert found.circuit() == known.circuit
    inside = torch.tensor([edge in known.circuit for edge in list_edges(known.model.cfg)])
    likely = found.probabilities[found.log_alpha > -torch.inf]
    # All of its edges stand above all others: an area under the curve of 1.
    assert likely[inside].min() > likely[~inside].max()


def test_gates_rank_edges_for_curves():
    model, _pairs, others = bundled()
    found = learned_on_bundled()
    assert found.scores.circuit(12) == found.circuit()
    curve = patching.faithfulness_curve(
        model, others[:8], scores=found.scores, metric=LogitDiff(), sizes=[1, 12, 50], progress=False
    )
    assert curve.sizes == (1, 12, 50)
    assert float(curve.faithfulness[1]) > 0.9


@pytest.mark.parametrize(
    ("level", "ablation", "metric"),
    [("edge", "resample", "kl"), ("edge", "mean", METRIC), ("node", "zero", "kl")],
)
def test_the_rounded_circuit_is_measured_as_evaluate_circuits_does(level, ablation, metric):
    found = learn(metric, level=level, ablation=ablation, target_size=5, batch_size=3)
    expected = patching.evaluate_circuits(
        MODEL,
        CLEAN,
        CORRUPTED,
        [found.circuit()],
        KL() if metric == "kl" else metric,
        ablation=ablation,
        progress=False,
    )
    # The same arithmetic in other batches, in float64.
    for row, whole in enumerate([expected.per_pair[0], expected.full_per_pair, expected.empty_per_pair]):
        torch.testing.assert_close(found.values[row], whole, rtol=0, atol=1e-10)
    assert int(found.held_out_pairs.sum()) == 2
    torch.testing.assert_close(
        found.held_out.per_pair[0], expected.per_pair[0][found.held_out_pairs], atol=1e-10, rtol=0
    )
    torch.testing.assert_close(
        found.trained.faithfulness_wang[0],
        (expected.per_pair[0] - expected.full_per_pair)[~found.held_out_pairs].mean().abs(),
        atol=1e-10,
        rtol=0,
    )


def test_means_given_by_hook_name_are_what_closed_edges_carry():
    names = ["resid_pre", "result", "mlp_out"]
    means = patching.mean_activations(MODEL, CORRUPTED, names)
    given, named = learn(ablation=means), learn(ablation="mean")
    torch.testing.assert_close(given.log_alpha, named.log_alpha)
    assert (given.ablation, named.ablation) == ("given", "mean")


def test_the_target_is_reached():
    found = learn(target_size=20, steps=100, holdout=0)
    assert (found.size, found.method) == (20, "lagrangian")
    # A tenth of all gates: multipliers go on pulling.
    assert float(found.sizes[-1]) == pytest.approx(20, abs=8)
    assert float(found.targets[-1]) == pytest.approx(20, abs=1e-4)
    assert float(found.targets[0]) > 75
    assert found.targets.diff().max() <= 1e-9
    by_share, by_size = (learn(**one, holdout=0) for one in ({"target_sparsity": 1 - 20 / 82}, {"target_size": 20}))
    assert torch.equal(by_share.log_alpha, by_size.log_alpha)


def test_a_price_on_gates_closes_more_the_higher_it_is():
    sizes = [float(learn(penalty=price, steps=20, lr=0.2).sizes[-1]) for price in (0.01, 100.0)]
    assert sizes[1] < sizes[0] - 20
    found = learn(penalty=0.01)
    assert found.size == int((found.probabilities > 0.5).sum())
    assert found.targets.isnan().all()
    assert found.method == "penalty"


def test_nodes_have_gates():
    found = learn(level="node", target_size=3, steps=5)
    circuit = found.circuit()
    assert len(circuit.nodes()) == 1 + 3 + 1
    for writer in found.writers:
        away = {edge for edge in list_edges(MODEL.cfg) if edge[0] == writer}
        assert away <= set(circuit) or not away & set(circuit)
    assert found.n_gates == len(found.writers) - 1
    assert circuit == found.circuit(3)
    assert found.circuit(found.n_gates) == Circuit.full(MODEL.cfg)


def test_the_seed_says_what_comes_out_and_nothing_else_is_moved():
    state = torch.get_rng_state()
    before = {name: parameter.clone() for name, parameter in MODEL.named_parameters()}
    one, again, other = learn(seed=1), learn(seed=1), learn(seed=2)
    assert torch.equal(one.log_alpha, again.log_alpha)
    assert torch.equal(one.held_out_pairs, again.held_out_pairs)
    assert not torch.equal(one.log_alpha, other.log_alpha)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in MODEL.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad
    assert not MODEL.training
    assert all(point.own is None for point in MODEL.hook_points().values())


def test_grounds_made_anew_give_what_grounds_held_do(monkeypatch):
    held = learn(batch_size=2, steps=5)
    monkeypatch.setattr(training.CircuitRunner, "grounds_to_hold", lambda self, ground, n: 0)
    anew = learn(batch_size=2, steps=5)
    assert torch.equal(held.log_alpha, anew.log_alpha)
    assert anew.stats.forwards > held.stats.forwards


def test_it_learns_under_inference_mode():
    with torch.inference_mode():
        found = learn()
    assert torch.equal(found.log_alpha, learn().log_alpha)


def test_scores_to_begin_with():
    scores = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, progress=False)
    begun = learn(warm_start=scores, steps=1, lr=1e-9)
    strength = scores.scores.T.abs()
    exists = begun.log_alpha > -torch.inf
    order = begun.log_alpha[exists].argsort(stable=True)
    assert bool((strength[exists][order].diff() >= 0).all())
    assert begun.circuit(20, connected=False) == scores.circuit(20, connected=False)


def test_what_was_learned_goes_on():
    first = learn(steps=5)
    further = learn(steps=1, lr=1e-9, warm_start=first)
    # Adam's step of 1e-9 is below float32's resolution here.
    torch.testing.assert_close(further.log_alpha, first.log_alpha)
    node = learn(level="node", steps=2, target_size=3)
    torch.testing.assert_close(
        learn(level="node", steps=1, lr=1e-9, target_size=3, warm_start=node).log_alpha, node.log_alpha
    )


def test_an_interrupt_gives_the_gates_so_far(monkeypatch):
    calls = []

    def run(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = training.SoftRun
    monkeypatch.setattr(training, "SoftRun", run)
    with pytest.raises(SweepInterruptedError, match=r"stopped after 3 of 6 steps .KeyboardInterrupt") as caught:
        learn(steps=6)
    found = caught.value.result
    assert len(found.losses) == len(found.sizes) == len(found.targets) == 3
    assert found.values.isnan().all()
    assert len(found.circuit()) == 20
    with pytest.raises(HookLensError, match="since training stopped before"):
        _ = found.trained
    monkeypatch.setattr(training, "SoftRun", original)
    assert len(learn(steps=2, warm_start=found).losses) == 2


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(
        MetricError, match=r"differs from the clean run's by a mean loss of .*; expected a number above"
    ):
        patching.learn_circuit(MODEL, CLEAN, CLEAN, METRIC, target_size=3, progress=False)
    broken = patching.FunctionMetric(
        lambda logits: (logits[:, -1, 0] * 0 + (-1.0)).sqrt() if logits.requires_grad else logits[:, -1, 0]
    )
    with pytest.raises(MetricError, match=r"the loss of step 0 is nan; lower lr, which is 0.1"):
        learn(broken, holdout=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_size": None}, "none of target_size, target_sparsity and penalty given; expected exactly one"),
        ({"target_size": 5, "penalty": 1.0}, "target_size and penalty given; expected exactly one"),
        ({"target_size": 83}, "learn_circuit: target_size is 83, expected a whole number, 1 to 82"),
        ({"target_size": 0}, "learn_circuit: target_size is 0"),
        ({"target_sparsity": 1.0}, "learn_circuit: target_sparsity is 1.0, expected a share from 0 to below 1"),
        ({"penalty": 0.0}, "learn_circuit: penalty is 0.0, expected a number above 0"),
        ({"level": "neuron"}, "learn_circuit: level is 'neuron', expected 'edge' or 'node'"),
        ({"steps": 0}, "learn_circuit: steps is 0"),
        ({"lr": -1}, "learn_circuit: lr is -1, expected a number above 0"),
        ({"holdout": 1.0}, "learn_circuit: holdout is 1.0, expected a share from 0 to below 1"),
        ({"holdout": 0.99}, "learn_circuit: holdout=0.99 of 8 pairs leaves none to find a circuit on"),
        ({"seed": 1.5}, "learn_circuit: seed is 1.5"),
        ({"ablation": "noise"}, "ablation is 'noise'; expected 'resample'"),
        ({"warm_start": 3}, "learn_circuit: warm_start is 3; expected EdgeScores, a LearnedCircuit, or None"),
        ({"progress": 3}, "progress is 3"),
    ],
)
def test_refusals(options, text):
    with unchecked(), pytest.raises(InputError, match=re.escape(text)):
        learn(**options)


def test_refusals_of_what_does_not_go_together():
    with pytest.raises(InputError, match="is a function that sees all pairs at once, so none can be held out; pass"):
        learn(lambda logits: logits[:, -1, 0])
    other = make_model("attention only")
    with pytest.raises(InputError, match=r"warm_start has .* writers and .* readers that are not this network's"):
        learn(model=other, warm_start=learn())
    with pytest.raises(InputError, match="warm_start has a gate on each node, and level is 'edge'; go on with"):
        learn(warm_start=learn(level="node", target_size=3))
    with unchecked(), pytest.raises(MetricError, match="a metric is a value such as"):
        learn("logit_diff")
