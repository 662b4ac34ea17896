"""2.x's head detector, against its definition and numbers that TransformerLens 2.18 gives."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens.compat.transformer_lens import HookedTransformer, head_detector
from hooklens.compat.transformer_lens.head_detector import detect_head

TEXT = "the cat sat on the mat and the cat sat"
# The first layer's heads, as 2.18 scores this model.
SCORES = {
    ("previous_token_head", "mul"): [0.0911, 0.1398, 0.2368, 0.0740],
    ("previous_token_head", "abs"): [-0.010, 0.056, 0.026, -0.069],
    ("duplicate_token_head", "mul"): [0.0487, 0.0444, 0.0713, 0.1229],
    ("duplicate_token_head", "abs"): [0.087, 0.229, -0.017, 0.211],
    ("induction_head", "mul"): [0.0252, 0.0449, 0.0701, 0.0562],
    ("induction_head", "abs"): [0.040, 0.230, -0.019, 0.078],
}


@functools.cache
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")


@functools.cache
def cached() -> Any:
    with torch.no_grad():
        return model().run_with_cache(TEXT, remove_batch_dim=True)[1]


def occurrences(tokens: list[int], shift: int) -> Tensor:
    """Ones where a key, `shift` places back, is an earlier occurrence of the query's token."""
    n = len(tokens)
    pattern = torch.zeros(n, n)
    for query in range(n):
        for key in range(query + 1):
            earlier = key - shift
            if 0 <= earlier < query and tokens[earlier] == tokens[query]:
                pattern[query, key] = 1
    return pattern


def test_patterns() -> None:
    for tokens in ([1, 2, 1, 3, 2, 1], [4, 4, 4], [5, 6]):
        ids = torch.tensor([tokens])
        previous = torch.diag(torch.ones(len(tokens) - 1), -1)
        assert torch.equal(head_detector.get_previous_token_head_detection_pattern(ids), previous)
        assert torch.equal(head_detector.get_duplicate_token_head_detection_pattern(ids), occurrences(tokens, 0))
        assert torch.equal(head_detector.get_induction_head_detection_pattern(ids), occurrences(tokens, 1))


@pytest.mark.parametrize(("name", "measure"), SCORES)
def test_scores_are_those_of_2x(name: str, measure: str) -> None:
    excluded = {"exclude_bos": measure == "abs", "exclude_current_token": measure == "abs"}
    found = detect_head(model(), TEXT, name, error_measure=measure, **excluded)
    assert found.shape == (4, 4)
    # The numbers have four, or three, digits.
    torch.testing.assert_close(found[0], torch.tensor(SCORES[name, measure]), rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_scores_are_their_definition(*, bos: bool, current: bool, measure: str) -> None:
    n = model().to_tokens(TEXT).shape[1]
    wanted = torch.tril(torch.ones(n, n), -1) / torch.arange(1, n + 1)[:, None] if measure == "abs" else torch.eye(n)
    options: dict[str, Any] = {"exclude_bos": bos, "exclude_current_token": current, "error_measure": measure}
    before = cached()["pattern", 1].clone()
    found = detect_head(model(), TEXT, wanted, cache=cached(), **options)
    assert torch.equal(cached()["pattern", 1], before)
    torch.testing.assert_close(found, detect_head(model(), TEXT, wanted, **options))
    counts = torch.ones(n, n)
    counts[:, 0] = not bos
    counts = counts * (1 - torch.eye(n)) if current else counts
    for layer in range(4):
        patterns = cached()["pattern", layer]
        if measure == "mul":
            expected = (patterns * counts * wanted).sum((1, 2)) / (patterns * counts).sum((1, 2))
        else:
            expected = 1 - ((patterns - wanted).abs() * counts).sum((1, 2)) / n
        # "abs" is rounded to three digits.
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=1e-6 if measure == "mul" else 5.1e-4)


def test_some_heads_and_several_texts() -> None:
    full = detect_head(model(), TEXT, "previous_token_head")
    for heads in ([(0, 1), (2, 3)], {0: [1], 2: [3]}):
        some = detect_head(model(), TEXT, "previous_token_head", heads)
        assert (some != -1).nonzero().tolist() == [[0, 1], [2, 3]]
        assert torch.equal(some[some != -1], full[some != -1])
    texts = ["the cat sat on", "a dog ran to"]
    mean = torch.stack([detect_head(model(), text, "induction_head", exclude_bos=True) for text in texts]).mean(0)
    torch.testing.assert_close(detect_head(model(), texts, "induction_head", exclude_bos=True), mean)


def test_refuses(caplog: pytest.LogCaptureFixture) -> None:
    n = model().to_tokens(TEXT).shape[1]
    for text, pattern, message in [
        (TEXT, "nonsense", "got nonsense"), ("", "previous_token_head", "non-empty"),
        ("a " * 400, "previous_token_head", "fit within"), (TEXT, torch.ones(n, n), "lower triangular"),
        (TEXT, torch.eye(n + 1), "lower triangular"), (TEXT, torch.ones(n), "lower triangular"),
    ]:  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            detect_head(model(), text, pattern)
    with pytest.raises(AssertionError, match="error_measure"):
        detect_head(model(), TEXT, "induction_head", error_measure="squares")
    with pytest.raises(AssertionError, match="not square"):
        head_detector.compute_head_attention_similarity_score(
            torch.ones(2, 3), torch.eye(2), exclude_bos=False, exclude_current_token=False, error_measure="mul"
        )
    detect_head(model(), TEXT, torch.eye(n) / 2)
    assert "other values" in caplog.text
