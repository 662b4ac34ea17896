import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.patching import KL, Circuit, LogitDiff, OptimalAblation, SiteError, SweepInterruptedError
from hooklens.patching.graph.nodes import list_edges
from hooklens.patching.learned import optimal
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens
from tests.patching.learned.tasks import indirect_objects

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(6, 5, seed=1), random_tokens(6, 5, seed=2)
CIRCUIT = Circuit(list_edges(MODEL.cfg)[::2])


def fit(circuit=CIRCUIT, metric="kl", *, model=MODEL, corrupted=CORRUPTED, **options):
    return patching.fit_optimal_ablation(
        model, CLEAN, corrupted, circuit, metric, **{"steps": 30, "progress": False, **options}
    )


def evaluate(ablation, metric=None, model=MODEL, circuit=CIRCUIT):
    found = patching.evaluate_circuits(
        model, CLEAN, CORRUPTED, [circuit], metric or KL(), ablation=ablation, progress=False
    )
    return found, found.per_pair[0]


@pytest.mark.parametrize("each_position", [False, True])
def test_the_loss_is_below_that_of_other_ablations_and_the_one_that_evaluation_gives(each_position):
    found = fit(each_position=each_position, batch_size=4, steps=15)
    losses = found.losses
    assert tuple(losses) == ("zero", "mean", "resample", "optimal")
    assert losses["optimal"] < 0.9 * min(losses["zero"], losses["mean"], losses["resample"])
    for name, ablation in {"zero": "zero", "resample": "resample", "optimal": found}.items():
        result, per_pair = evaluate(ablation)
        # The same runs in other batches, in float64.
        assert losses[name] == pytest.approx(float(per_pair.mean()), rel=1e-9)
        assert result.ablation == name
    if each_position:
        assert losses["mean"] == pytest.approx(float(evaluate("mean")[1].mean()), rel=1e-9)
    assert found.each_position is each_position


def test_other_metrics_are_brought_close_to_the_clean_runs():
    metric = LogitDiff(8, 2)
    found = fit(metric=metric, steps=50)
    for name, ablation in {"zero": "zero", "optimal": found}.items():
        result, per_pair = evaluate(ablation, metric)
        expected = (per_pair - result.full_per_pair).square().mean()
        assert found.losses[name] == pytest.approx(float(expected), rel=1e-8)
    assert found.losses["optimal"] < 0.5 * min(found.losses["zero"], found.losses["mean"])


def test_it_is_the_minimum_where_that_can_be_written_down():
    """Without a last norm, logits are linear in what the last layer's heads write. So with the edges from these to
    the logits ablated, the mean square of the difference to the clean run is smallest at the mean, where it is the
    variance of what they add to the metric."""
    model = make_model("attention only")
    cut = [edge for edge in list_edges(model.cfg) if edge[0].startswith("a1.") and edge[1] == "logits"]
    circuit = Circuit.full(model.cfg).without_edges(cut)
    found = fit(circuit, LogitDiff(3, 5), model=model, steps=100)
    _, cache = model.run_with_cache(CLEAN, names_filter="blocks.1.attn.hook_result")
    written = cache["blocks.1.attn.hook_result"][:, -1].sum(1)
    added = written @ (model.W_U[:, 3] - model.W_U[:, 5])
    # Adam comes as close as its last steps are small.
    assert found.losses["optimal"] == pytest.approx(float(added.detach().var(unbiased=False)), rel=1e-3)


def test_constants_fit_prompts_of_different_lengths():
    lengths = (5, 3, 4)
    rows = [[row[:n] for row, n in zip(random_tokens(3, 5, seed=seed), lengths, strict=True)] for seed in (1, 2)]
    (clean, mask), (corrupted, _) = (pad_rows(one, "right") for one in rows)
    found = patching.fit_optimal_ablation(
        MODEL, clean, corrupted, CIRCUIT, attention_mask=mask, steps=5, progress=False
    )
    means = patching.mean_activations(
        MODEL, corrupted, ["resid_pre", "result", "mlp_out"], each_position=False, attention_mask=mask
    )
    result = patching.evaluate_circuits(
        MODEL, clean, corrupted, [CIRCUIT], KL(), ablation=means, attention_mask=mask, progress=False
    )
    assert found.losses["mean"] == pytest.approx(float(result.values[0]), rel=1e-9)
    with pytest.raises(InputError, match=r"each_position=True needs prompts of one length.*between 3 and 5 tokens"):
        patching.fit_optimal_ablation(
            MODEL, clean, corrupted, CIRCUIT, attention_mask=mask, each_position=True, progress=False
        )


def test_the_seed_says_what_comes_out_and_nothing_else_is_moved():
    state = torch.get_rng_state()
    one, again = fit(seed=1, batch_size=2, steps=6), fit(seed=1, batch_size=2, steps=6)
    other = fit(seed=2, batch_size=2, steps=6)
    assert torch.equal(one.history, again.history)
    assert not torch.equal(one.history, other.history)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in MODEL.parameters())


def test_an_interrupt_gives_the_best_so_far(monkeypatch):
    original, calls = optimal.torch.optim.Adam.step, []

    def step(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(optimal.torch.optim.Adam, "step", step)
    with pytest.raises(SweepInterruptedError, match="stopped after 3 of 30 steps") as caught:
        fit()
    found = caught.value.result
    assert len(found.history) == 3
    assert found.losses["optimal"] <= min(found.losses["zero"], found.losses["mean"])


def test_what_it_shows_and_its_file(tmp_path):
    found = fit(steps=3, each_position=True)
    lines = repr(found).splitlines()
    assert lines[0] == "OptimalAblation(constants at 5 hook points, each position, for a circuit of 41 edges)"
    assert lines[1].startswith("  loss (KL)  zero ")
    assert found.to_dataframe()["ablation"].tolist() == ["zero", "mean", "resample", "optimal"]
    assert [trace.name for trace in found.plot().data] == ["fitted", "zero", "mean", "resample"]
    assert found.plot(backend="matplotlib", title="mine").axes[0].get_title() == "loss"
    path = tmp_path / "constants.safetensors"
    found.save(path)
    read = OptimalAblation.load(path)
    assert repr(read) == repr(found)
    assert list(read) == list(found)
    assert all(torch.equal(read[name], found[name]) for name in found)
    assert (read.circuit, read.losses) == (found.circuit, found.losses)
    with pytest.raises(CheckpointError, match="does not hold a sweep"):
        patching.SweepResult.load(path)
    with pytest.raises(HookLensError, match="fitted in no steps"):
        OptimalAblation(
            outputs=found.outputs, circuit=CIRCUIT, losses=found.losses, history=found.history[:0], metric="KL"
        ).plot()


def test_refusals():
    for options, text in [
        ({"circuit": None}, "fit_optimal_ablation: circuit missing"),
        ({"circuit": [("embed", "logits")]}, "fit_optimal_ablation: circuit is .*, expected a patching.Circuit"),
        ({"steps": 0}, "fit_optimal_ablation: steps is 0"),
        ({"lr": 0}, "fit_optimal_ablation: lr is 0, expected a number above 0"),
        ({"seed": "x"}, "fit_optimal_ablation: seed is 'x'"),
        ({"each_position": 2}, "fit_optimal_ablation: each_position is 2"),
    ]:
        with unchecked(), pytest.raises(InputError, match=text):
            fit(**options)
    with pytest.raises(SiteError, match="the circuit does not fit the network"):
        fit(Circuit([("a7.h0", "logits")]))


def test_on_a_bundled_model():
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    pairs = indirect_objects(model, 8, seed=0)
    scores = patching.edge_attribution(model, pairs, metric=LogitDiff(), progress=False)
    found = patching.fit_optimal_ablation(model, pairs, circuit=scores.circuit(60), steps=10, progress=False)
    # Ten steps from the mean on; a hundred of them halve its loss.
    assert found.losses["optimal"] < 0.9 * min(found.losses["zero"], found.losses["mean"])
