"""Drawing one token for each row of logits, outside of a generation."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.optional import import_package


def sample_logits(
    logits: Float[Tensor, "batch d_vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    freq_penalty: float = 0.0,
    tokens: Int[Tensor, "batch pos"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """A token for each row, drawn from the softmax of its logits.

    Args:
        logits: of the position that the token follows.
        temperature: the logits are divided by it; 0 takes the likeliest.
        top_k: of the `top_k` likeliest only.
        top_p: of the likeliest that have this probability together only (Holtzman et al. 2020).
        freq_penalty: taken off a token's logit for each time that it stands in `tokens`, after the temperature.
        tokens: what each row has so far, for `freq_penalty`.
        generator: torch's; None: torch's own global one.

    Raises:
        InputError: values out of range, or a penalty without tokens.
    """
    problems = [
        f"{name} is {value!r}, expected {expected}"
        for name, value, expected, is_fine in (
            ("temperature", temperature, "0 or more", temperature >= 0),
            ("top_k", top_k, "1 or more", top_k is None or top_k >= 1),
            ("top_p", top_p, "above 0, at most 1", top_p is None or 0 < top_p <= 1),
        )
        if not is_fine
    ]
    if freq_penalty and tokens is None:
        problems.append("freq_penalty counts what each row has so far: give tokens=")
    if problems:
        raise InputError(f"sample_logits: {'; '.join(problems)}")
    scores = logits if temperature == 0 else logits / temperature
    if freq_penalty and tokens is not None:
        counts = torch.stack([torch.bincount(row, minlength=logits.shape[-1]) for row in tokens])
        scores = scores - freq_penalty * counts.to(scores)
    if temperature == 0:
        return scores.argmax(-1)
    warpers: Any = import_package("transformers.generation")
    ids: Any = tokens
    if top_k is not None:
        scores = warpers.TopKLogitsWarper(top_k)(ids, scores)
    if top_p is not None and top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(ids, scores)
    return torch.multinomial(scores.float().softmax(-1), 1, generator=generator)[:, 0]
