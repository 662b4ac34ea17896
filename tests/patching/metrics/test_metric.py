import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import InputError
from hooklens.patching import KL, Accuracy, FractionRecovered, LogitDiff, LogProb, Loss, MetricError, Probability
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens


@pytest.fixture
def logits():
    return torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_values_of_a_batch(logits):
    p = logits.softmax(-1)
    rows = torch.arange(3)
    torch.testing.assert_close(LogitDiff(2, 5)(logits), logits[:, -1, 2] - logits[:, -1, 5])
    torch.testing.assert_close(LogProb([1, 2, 3], pos=0)(logits), p[rows, 0, torch.tensor([1, 2, 3])].log())
    torch.testing.assert_close(Probability(4)(logits), p[:, -1, 4])
    torch.testing.assert_close(Probability(4, pos=[0, 2])(logits), p[:, [0, 2], 4].mean(1))
    best = logits[:, -1].argmax(-1)
    assert Accuracy(best)(logits).tolist() == [1.0, 1.0, 1.0]
    assert Accuracy(int(best[0]))(logits).tolist() == (best == best[0]).double().tolist()
    reference = torch.randn(3, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=reference[i, 0]),
            torch.distributions.Categorical(logits=logits[i, -1]),
        )
        for i in range(3)
    ]
    torch.testing.assert_close(KL(reference=reference)(logits), torch.stack(expected))


def test_loss_is_the_models_own():
    model = make_model("rotary")
    tokens = random_tokens(1, 5)
    result = patching.sweep(model, tokens, random_tokens(1, 5, seed=9), "z", Loss(tokens=tokens), progress=False)
    assert result.clean == pytest.approx(float(model(tokens, return_type="loss").detach()))


def test_fraction_recovered_is_one_for_the_clean_run():
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    metric = FractionRecovered(LogitDiff([1, 2], 3))
    result = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
    plain = patching.sweep(model, clean, corrupted, "resid_pre", metric.metric, progress=False)
    assert (result.clean, result.corrupted) == (1.0, 0.0)
    low, high = plain.corrupted_per_pair, plain.clean_per_pair
    torch.testing.assert_close(result.per_pair, (plain.per_pair - low) / (high - low))
    with pytest.raises(InputError, match=r"pairs \[0, 1\] have the same value"):
        patching.sweep(model, clean, clean, "resid_pre", metric, progress=False)


def test_one_reference_per_pair():
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    given = KL(reference=model(clean)[:, [-1]])
    for metric in (given, KL(), KL(reference="corrupted")):
        result = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
        zero = result.corrupted_per_pair if metric.reference == "corrupted" else result.clean_per_pair
        torch.testing.assert_close(zero, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_refusals(logits):
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)

    def refuse(error, match, metric):
        with pytest.raises(error, match=match):
            patching.sweep(model, clean, corrupted, "z", metric, progress=False)

    refuse(InputError, "Loss reads all positions", Loss(pos=1))
    refuse(InputError, "expected 1 or one per pair", KL(reference=torch.zeros(3, 1, 23)))
    with unchecked():
        refuse(InputError, "reference is 'other'", KL(reference="other"))
    refuse(InputError, "no tokenizer", LogProb(" Mary"))
    for metric in (KL(), Loss(), FractionRecovered(LogitDiff(1, 2))):
        with pytest.raises(MetricError, match="was not prepared"):
            metric(logits)


def test_texts_are_encoded_for_calls_on_logits():
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    logits = model(["Mary gave a drink to John", "John gave a drink to Mary"]).detach()
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
    expected = logits[:, -1, mary] - logits[:, -1, john]
    metric = LogitDiff(" Mary", " John")
    torch.testing.assert_close(metric.encode(model)(logits), expected)
    torch.testing.assert_close(
        LogitDiff([" Mary", " John"], [john, mary]).encode(model)(logits), expected * torch.tensor([1, -1])
    )
    scaled = FractionRecovered(metric, ends=(torch.zeros(2), torch.full((2,), 2.0))).encode(model)
    torch.testing.assert_close(scaled(logits), expected / 2)
    best = Accuracy([" Mary", int(logits[1, -1].argmax())]).encode(model)(logits)
    assert best[1] == 1.0
    with pytest.raises(MetricError, match=r"LogitDiff: ' Mary' is text.*call metric\.encode\(model\) first"):
        metric(logits)
    with pytest.raises(MetricError, match="LogProb: 3 tokens for 2 rows of logits; expected 1 or one for each"):
        LogProb([1, 2, 3])(logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("metric", [KL(pos=None), LogitDiff(3, 5, pos=None), Probability(4, pos=None), Loss()])
def test_means_over_all_positions_leave_padding_out(metric, side):
    """Columns that pad the shorter prompts of a batch were part of the mean."""
    model = make_model("grouped")
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], side), pad_rows(rows[1], side)
    scaled = FractionRecovered(metric)
    sites = patching.grid("z", layers=1)
    together = [
        patching.sweep(model, clean, corrupted, sites, each, attention_mask=mask, progress=False).per_pair
        for each in (metric, scaled)
    ]
    for i in range(2):
        alone = [
            patching.sweep(model, rows[0][i][None], rows[1][i][None], sites, each, progress=False).per_pair[..., 0]
            for each in (metric, scaled)
        ]
        torch.testing.assert_close([values[..., i] for values in together], alone, rtol=0, atol=1e-10)
