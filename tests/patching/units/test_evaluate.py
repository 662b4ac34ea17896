import pytest
import torch

from hooklens.errors import HookNameError, InputError
from hooklens.patching import KL, LogitDiff, Pair, SiteError, UnitCircuit, UnitResult, evaluate_units
from hooklens.sae import SAE, SAEConfig
from hooklens.sae.config import SAETraining
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
NAMES = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff([3, 4, 5], [6, 7, 8])
CIRCUITS = {
    "some": UnitCircuit({NAMES[0]: [0, 3, 7], NAMES[1]: [1, 19]}),
    "first": UnitCircuit({NAMES[0]: range(20), NAMES[1]: []}),
    "all": UnitCircuit({NAMES[0]: range(20), NAMES[1]: range(20)}),
    "none": UnitCircuit({NAMES[0]: [], NAMES[1]: []}),
}


def evaluate(**options):
    return evaluate_units(MODEL, CLEAN, CORRUPTED, CIRCUITS, METRIC, **{"progress": False, **options})


def by_hand(circuit, row, *, model=MODEL, ablation="resample", splices=(), clean=CLEAN, corrupted=CORRUPTED):
    """One prompt, one run, entry by entry."""
    names = list(circuit.kept)
    _, other = model.run_with_cache(corrupted[row : row + 1], names_filter=names, splices=splices)
    _, rest = model.run_with_cache(corrupted, names_filter=names, splices=splices)

    def put(tensor, hook):
        new = tensor.clone()
        for entry in set(range(tensor.shape[-1])) - set(circuit.kept[hook.name]):
            value = {"resample": other[hook.name], "mean": rest[hook.name].mean(0, keepdim=True)}.get(ablation)
            new[..., entry] = 0.0 if value is None else value[..., entry]
        return new

    with torch.no_grad():
        logits = model.run_with_hooks(clean[row : row + 1], fwd_hooks=[(name, put) for name in names], splices=splices)
    return float(logits[0, -1, 3 + row] - logits[0, -1, 6 + row])


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("batch_size", ["auto", 1, 4])
def test_every_circuit_is_a_run_with_all_others_ablated(ablation, batch_size):
    found = evaluate(ablation=ablation, batch_size=batch_size)
    assert found.labels == ("some", "first", "all", "none")
    for place, circuit in enumerate(CIRCUITS.values()):
        for row in range(3):
            expected = by_hand(circuit, row, ablation=ablation)
            assert float(found.per_pair[place, row]) == pytest.approx(expected, abs=1e-9)
    assert float(found.faithfulness_hanna[2]) == pytest.approx(1.0)
    assert float(found.faithfulness_hanna[3]) == pytest.approx(0.0, abs=1e-12)
    assert found.ablation == ablation


def test_given_values_and_nothing_left_behind():
    values = {name: torch.full((1, 1, 20), 0.3, dtype=torch.float64) for name in NAMES}
    before = torch.random.get_rng_state()
    found = evaluate(ablation=values)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(point.own is None for point in MODEL.hook_points().values())
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    assert found.ablation == "given"

    def put(tensor, hook):
        return torch.full_like(tensor, 0.3)

    logits = MODEL.run_with_hooks(CLEAN, fwd_hooks=[(name, put) for name in NAMES])
    rows = torch.arange(3)
    torch.testing.assert_close(found.per_pair[3], logits[rows, -1, rows + 3] - logits[rows, -1, rows + 6])


def test_prompts_of_different_length():
    pairs = [
        Pair(random_tokens(1, 4 + row, seed=row)[0], random_tokens(1, 4 + row, seed=9 + row)[0],
             answer=3 + row, wrong=6 + row)
        for row in range(3)
    ]  # fmt: skip
    found = evaluate_units(MODEL, pairs, circuits=CIRCUITS, metric=LogitDiff(), progress=False)
    for row, pair in enumerate(pairs):
        ids = {"clean": pair.clean.expand(3, -1), "corrupted": pair.corrupted.expand(3, -1)}
        expected = by_hand(CIRCUITS["some"], row, **ids)
        assert float(found.per_pair[0, row]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_latents_of_a_spliced_autoencoder(error):
    place = "blocks.0.hook_mlp_out"
    sae = SAE(SAEConfig(d_in=12, d_sae=15, training=SAETraining(hook_name=place))).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    splice = sae.at(error=error)
    circuit = UnitCircuit({f"{place}.hook_sae_acts": [0, 2, 4, 6]})
    found = evaluate_units(
        MODEL, CLEAN, CORRUPTED, [circuit], METRIC, splices=[splice], ablation="zero", progress=False
    )
    for row in range(3):
        expected = by_hand(circuit, row, ablation="zero", splices=[splice])
        assert float(found.per_pair[0, row]) == pytest.approx(expected, abs=1e-9)
    logits = MODEL.run_with_hooks(CLEAN, splices=[splice])
    rows = torch.arange(3)
    torch.testing.assert_close(found.full_per_pair, logits[rows, -1, rows + 3] - logits[rows, -1, rows + 6])
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_metrics_that_compare_with_the_clean_run():
    found = evaluate_units(MODEL, CLEAN, CORRUPTED, CIRCUITS, KL(), progress=False)
    torch.testing.assert_close(found.full_per_pair, torch.zeros(3, dtype=torch.float64))
    assert bool((found.per_pair[3] > 0).all())


def test_tables_and_plots():
    found = evaluate()
    assert isinstance(found, UnitResult)
    table = found.to_dataframe()
    assert table.units.tolist() == [5, 20, 40, 0]
    assert list(table.columns)[:4] == ["circuit", "units", "value", "standard_error"]
    assert table.faithfulness_wang.tolist() == pytest.approx(found.faithfulness_wang.tolist())
    assert found.plot() is not None


def test_refusals():
    with pytest.raises(HookNameError, match=r"blocks\.7\.mlp\.hook_post"):
        evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit({"blocks.7.mlp.hook_post": [1]})], METRIC)
    with pytest.raises(SiteError, match=r"hook_z \[3, 5, 4, 6\]'; take mlp\.hook_post, a stream, or the latents"):
        evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit({"blocks.0.attn.hook_z": [1]})], METRIC, progress=False)
    with pytest.raises(InputError, match=r"hook_post has 20 entries, and the circuit holds \[20\]"):
        evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit({NAMES[0]: [20]})], METRIC, progress=False)
    with pytest.raises(InputError, match=r"\['blocks\.1\.mlp\.hook_post'\] are in some of these alone"):
        evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit({NAMES[0]: [1]}), CIRCUITS["all"]], METRIC)
    with (
        unchecked(),
        pytest.raises(InputError, match="takes a list of UnitCircuits, or a mapping to them; this"),
    ):
        evaluate_units(MODEL, CLEAN, CORRUPTED, [], METRIC)
    with unchecked(), pytest.raises(InputError, match="ablation is 'half'; expected 'resample', 'mean', 'zero'"):
        evaluate(ablation="half")
    with pytest.raises(SiteError, match=r"the ablation has no values for 'blocks\.0\.mlp\.hook_post', 'blocks\.1"):
        evaluate(ablation={"x": torch.zeros(1)})
