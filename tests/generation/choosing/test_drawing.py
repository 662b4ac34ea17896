"""Drawing single tokens from logits."""

import pytest
import torch

from hooklens.errors import InputError
from hooklens.generation import sample_logits

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 4.0, -1.0]])


def frequencies(**options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = LOGITS[:1].expand(20_000, -1)
    drawn = sample_logits(rows, generator=generator, **options)  # type: ignore[arg-type]
    return torch.bincount(drawn, minlength=4) / 20_000


def test_draws_follow_the_distribution() -> None:
    """20,000 draws: their shares have a standard deviation below 0.0036."""
    torch.testing.assert_close(frequencies(), LOGITS[0].softmax(-1), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(temperature=0.5), (LOGITS[0] * 2).softmax(-1), atol=0.015, rtol=0)
    two = torch.tensor([-torch.inf, 3.0, -torch.inf, 2.0]).softmax(-1)
    torch.testing.assert_close(frequencies(top_k=2), two, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.85), two, atol=0.015, rtol=0)


def test_temperature_0_is_the_likeliest() -> None:
    assert sample_logits(LOGITS, temperature=0).tolist() == [1, 0]


def test_a_penalty_counts_what_there_is() -> None:
    tokens = torch.tensor([[1, 1, 3], [0, 0, 0]])
    assert sample_logits(LOGITS, temperature=0, freq_penalty=2.0, tokens=tokens).tolist() == [2, 2]
    torch.manual_seed(0)
    drawn = sample_logits(LOGITS, freq_penalty=1e4, tokens=tokens)
    assert drawn[0] in (0, 2)
    assert drawn[1] != 0


def test_torchs_own_generator_decides() -> None:
    first, second = (torch.manual_seed(3) and sample_logits(LOGITS.repeat(50, 1)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(3)
    expected = torch.distributions.Categorical(logits=LOGITS.repeat(50, 1)).sample()
    assert torch.equal(first, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"freq_penalty": 1.0}, "give tokens="),
    ],
)
def test_bad_input_is_told(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_logits(LOGITS, **options)  # type: ignore[arg-type]
