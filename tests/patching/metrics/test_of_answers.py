import numpy as np
import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import InputError
from hooklens.patching import Accuracy, FractionRecovered, LogitDiff, LogProb, MetricError, Probability
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

GROUPS = [[1, 2, 3], [4], [5, 6]]
WRONG = [[0], [5, 6], [2, 3]]


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


@pytest.mark.parametrize("over", ["mean", "logsumexp"])
def test_several_answers_are_averaged_or_one_event(logits, over):
    """The definitions in the module's table, pair by pair in plain torch."""
    last = logits[:, -1]
    p = last.softmax(-1)
    join = torch.mean if over == "mean" else torch.sum

    def logit(row, ids):
        return row[ids].mean() if over == "mean" else row[ids].exp().sum().log()

    expected = torch.stack([logit(r, a) - logit(r, w) for r, a, w in zip(last, GROUPS, WRONG, strict=True)])
    torch.testing.assert_close(LogitDiff(GROUPS, WRONG, over=over)(logits), expected)
    expected = torch.stack([join(r[a]) for r, a in zip(p, GROUPS, strict=True)])
    torch.testing.assert_close(Probability(GROUPS, over=over)(logits), expected)
    if over == "mean":
        expected = torch.stack([r[a].log().mean() for r, a in zip(p, GROUPS, strict=True)])
    else:
        expected = expected.log()
    torch.testing.assert_close(LogProb(GROUPS, over=over)(logits), expected)
    # A row of one stands for itself, and one row serves all pairs.
    torch.testing.assert_close(LogProb([[4]] * 3, over=over)(logits), LogProb(4)(logits))
    shared = torch.tensor([[1, 2]])
    torch.testing.assert_close(LogProb(shared, over=over)(logits), LogProb([[1, 2]] * 3, over=over)(logits))


def test_accuracy_counts_any_of_several_answers(logits):
    best = logits[:, -1].argmax(-1).tolist()
    others = [(one + 1) % 7 for one in best]
    given = [[others[0], best[0]], [best[1]], [others[2]]]
    assert Accuracy(given)(logits).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [[3, 4, 5], [[3, 4], [5, 6], [7, 8]], torch.tensor([[3, 4], [5, 6], [7, 8]])])
@pytest.mark.parametrize("over", ["mean", "logsumexp"])
def test_sweeps_read_each_pairs_own_answers(answer, over):
    model = make_model("grouped")
    clean, corrupted = random_tokens(3, 5), random_tokens(3, 5, seed=9)
    metric = LogitDiff(answer, 1, over=over)
    whole = patching.sweep(model, clean, corrupted, "z", metric, progress=False)
    for row in range(3):
        own = LogitDiff([np.asarray(answer)[row].tolist()], 1, over=over)
        one = patching.sweep(model, clean[[row]], corrupted[[row]], "z", own, progress=False)
        torch.testing.assert_close(whole.per_pair[..., row], one.per_pair[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", [LogitDiff(3, 5), LogProb([[3, 4]]), Probability([[3, 4]], over="logsumexp")])
def test_half_precision_logits_are_widened_before_anything_is_done(metric):
    """`LogitDiff` subtracted in bfloat16: of 100.0 - 99.5 nothing was left to compare."""
    logits = (100 + torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1))).bfloat16()
    found = metric(logits)
    assert found.dtype == torch.float32
    # Float32 arithmetic on the same numbers, up to the order of sums.
    torch.testing.assert_close(found, metric(logits.float()), rtol=1e-6, atol=1e-6)
    both = FractionRecovered(metric, ends=(torch.zeros(4), torch.ones(4)))
    assert both(logits).dtype == torch.float32


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
    with pytest.raises(MetricError, match="LogProb: answer: 3 tokens for 2 rows of logits; expected 1 or one for each"):
        LogProb([1, 2, 3])(logits)


def test_refusals(logits):
    """Answers `[3, 2]` were flattened and fitted six pairs; `True` was token 1."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(6, 5), random_tokens(6, 5, seed=9)

    def refuse(match, metric):
        with pytest.raises(InputError, match=match):
            patching.sweep(model, clean, corrupted, "z", metric, progress=False)

    refuse("LogProb: answer: 3 tokens for 6 pairs; expected 1 or 6", LogProb(torch.arange(6).reshape(3, 2)))
    refuse("LogProb: answer: 2 tokens for 6 pairs.*a list of their own", LogProb([1, 2]))
    refuse("no tokenizer", LogProb(" Mary"))
    refuse(r"LogitDiff: wrong: token ids \[99\] are outside", LogitDiff(1, [[2, 99]]))
    refuse(r"LogitDiff: answer is not given.*Pair\(clean, corrupted, answer=", LogitDiff())
    with unchecked():
        for make, match in (
            (lambda: LogitDiff(3, True), "LogitDiff: wrong is True"),
            (lambda: LogProb(3, over="max"), "LogProb: over is 'max', expected 'mean' or 'logsumexp'"),
            (lambda: LogProb(2.5), r"LogProb: answer is 2\.5"),
        ):
            with pytest.raises(InputError, match=match):
                make()
    with pytest.raises(MetricError, match="LogProb was not prepared: give answer"):
        LogProb()(logits)
