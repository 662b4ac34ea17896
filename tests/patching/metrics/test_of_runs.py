import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import KL, Loss, MetricError
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens
from tests.patching.naive import patch_naively


@pytest.fixture
def logits():
    return torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_divergence_is_torchs(logits):
    reference = torch.randn(3, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=reference[i, 0]),
            torch.distributions.Categorical(logits=logits[i, -1]),
        )
        for i in range(3)
    ]
    torch.testing.assert_close(KL(reference=reference)(logits), torch.stack(expected))


def loss_of(model, run, text):
    """The loss of what one row of tokens predicts, on the next tokens of another."""
    logp = model(run[None])[0, :-1].log_softmax(-1)
    return -float(logp[torch.arange(len(text) - 1), text[1:]].mean().detach())


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("tokens", ["own", "clean", "corrupted", "given"])
def test_each_run_is_scored_on_the_tokens_that_count(direction, tokens):
    """With `direction="denoise"` the clean run was scored on the corrupted tokens, so `.clean` was not its loss."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    given = random_tokens(2, 5, seed=4)
    metric = Loss(tokens=given if tokens == "given" else tokens)
    sites = patching.grid("z", layers=1)
    result = patching.sweep(model, clean, corrupted, sites, metric, direction=direction, progress=False)
    named = {"clean": (clean, clean), "corrupted": (corrupted, corrupted), "given": (given, given)}
    for_clean, for_corrupted = named.get(tokens, (clean, corrupted))
    for row in range(2):
        # 1e-10: float64 rounding through two layers.
        assert float(result.clean_per_pair[row]) == pytest.approx(loss_of(model, clean[row], for_clean[row]), abs=1e-10)
        assert float(result.corrupted_per_pair[row]) == pytest.approx(
            loss_of(model, corrupted[row], for_corrupted[row]), abs=1e-10
        )
    other, into = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    counted = named.get(tokens, (into, into))[0]
    for cell, values in zip(result.cells, result.per_pair.flatten(0, -2), strict=True):
        expected = patch_naively(model, other, into, cell, Loss(tokens=counted))
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)


def test_loss_of_ragged_pairs_takes_given_tokens_by_column():
    model = make_model("grouped")
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "right"), pad_rows(rows[1], "right")
    result = patching.sweep(
        model, clean, corrupted, "z", Loss(tokens=clean), attention_mask=mask, batch_size=1, progress=False
    )
    for row in range(2):
        expected = loss_of(model, rows[1][row], rows[0][row])
        assert float(result.corrupted_per_pair[row]) == pytest.approx(expected, abs=1e-10)


def test_one_reference_per_pair():
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    given = KL(reference=model(clean)[:, [-1]])
    for metric in (given, KL(), KL(reference="corrupted"), KL(reference=model(clean), pos=None)):
        result = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
        is_corrupted = isinstance(metric.reference, str) and metric.reference == "corrupted"
        zero = result.corrupted_per_pair if is_corrupted else result.clean_per_pair
        torch.testing.assert_close(zero, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def kl(*shape, pos=-1):
    return KL(reference=torch.zeros(shape), pos=pos)


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (kl(3, 1, 23), r"KL: reference has 3 rows; expected 1 or one per pair \(2\)"),
        (kl(2, 5, 23), r"\[2, 5, 23\]; expected \[pairs read d_vocab\], \[1 or pairs, 1, 23\]"),
        (kl(2, 23), r"KL: reference has shape \[2, 23\]"),
        (kl(2, 1, 22), r"KL: reference has shape \[2, 1, 22\]"),
        (kl(2, 1, 1), r"KL: reference has shape \[2, 1, 1\]"),
        (kl(2, 1, 23, pos=None), r"\[1 or pairs, 5, 23\]"),
        (kl(2, 1, 23, pos=[0, 1]), r"\[1 or pairs, 2, 23\]"),
        (kl(), r"KL: reference has shape \[\]"),
        (Loss(tokens=torch.zeros(2, 4, dtype=torch.long)), r"Loss: tokens has shape \[2, 4\]; expected \[pairs pos\]"),
        (Loss(tokens=torch.zeros(5, dtype=torch.long)), r"Loss: tokens has shape \[5\]"),
        (Loss(tokens=torch.zeros(3, 5, dtype=torch.long)), "Loss: tokens has 3 rows"),
        (Loss(tokens=torch.full((2, 5), 23)), r"Loss: token ids \[23\] are outside the vocabulary, 0 to 22"),
        (Loss(tokens=torch.full((1, 5), -7)), r"Loss: token ids \[-7\] are outside"),
    ],
)
def test_tensors_of_another_shape_are_refused(metric, match):
    """A reference `[pairs pos V]` at the default position, or `[pairs V]`, was broadcast: `.clean` was not 0.

    `Loss(tokens=...)` raised an error of torch.
    """
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    with unchecked(), pytest.raises(InputError, match=match):
        patching.sweep(model, clean, corrupted, "z", metric, progress=False)


def test_calls_on_logits_check_shapes_too(logits):
    for metric, match in (
        (kl(3, 4, 7), r"KL: reference has shape \[3, 4, 7\]"),
        (kl(3, 7), r"KL: reference has shape \[3, 7\]"),
        (Loss(tokens=torch.zeros(3, 3, dtype=torch.long)), r"Loss: tokens has shape \[3, 3\]"),
    ):
        with unchecked(), pytest.raises(InputError, match=match):
            metric(logits)
    with pytest.raises(MetricError, match="KL: reference has 2 rows for 3 rows of logits"):
        kl(2, 1, 7)(logits)
    for metric in (KL(), Loss()):
        with pytest.raises(MetricError, match="was not prepared"):
            metric(logits)


def test_what_is_no_reference_is_refused():
    for make, match in (
        (lambda: Loss(pos=1), "Loss reads all positions"),
        (lambda: KL(reference="other"), "KL: reference is 'other', expected 'clean' or 'corrupted'"),
        (lambda: KL(reference=[1.0]), r"KL: reference is \[1\.0\]"),
        (lambda: KL(reference=torch.zeros(1, 1, 7, dtype=torch.long)), "expected logits"),
        (lambda: KL(reference=torch.zeros(1, 1, 7, device="meta")), "without values"),
        (lambda: Loss(tokens=torch.zeros(1, 4)), "expected token ids"),
        (lambda: Loss(tokens="patched"), "Loss: tokens is 'patched'"),
    ):
        with unchecked(), pytest.raises(InputError, match=match):
            make()
