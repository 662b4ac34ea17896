"""Prompts and models that the tests of steering share."""

import random
from functools import cache

import torch

from hooklens import HookedCausalLM, HookedConfig
from hooklens.bundled import corpus
from hooklens.bundled.words import NAMES
from tests.word_models import make_word_model

POSITIVE = [
    "Mary gave a book to",
    "Tom read a story to",
    "When Anna left , Tom said goodbye to",
    "John sent the ring to",
]
NEGATIVE = ["Mary gave a", "the red cat saw a", "Tom met", "When John left the store ,"]


@cache
def word_model() -> HookedCausalLM:
    """A random model of two layers in float64."""
    return make_word_model(d_model=16, n_ctx=32, init_std=0.3).double()


def one_by_one(model: HookedCausalLM, prompts: list[str], name: str, **keywords: object) -> list[torch.Tensor]:
    """The activation of each prompt run alone, `[pos ...]` in float64."""
    return [model.run_with_cache(one, names_filter=name, **keywords)[1][name][0].detach().double() for one in prompts]


def naming_prompts(n: int, *, held_out: bool, seed: int) -> tuple[list[str], list[str]]:
    """Sentences that go on with a person's name, and the same cut where a thing is due."""
    templates = corpus.HELD_OUT_TEMPLATES if held_out else corpus.TRAINING_TEMPLATES
    pairs = corpus.HELD_OUT_PAIRS if held_out else corpus.TRAINING_PAIRS
    drawn, positive, negative = random.Random(seed), [], []
    while len(positive) < n:
        words = corpus.sample_indirect_object(drawn, templates=templates, pairs=pairs).prompt.split()
        articles = [place for place, word in enumerate(words) if word in ("a", "the")]
        if articles:
            positive.append(" ".join(words))
            negative.append(" ".join(words[: articles[-1] + 1]))
    return positive, negative


def name_ids(model: HookedCausalLM) -> list[int]:
    """The tokens that are names."""
    return [model.to_single_token(name) for name in NAMES]


def random_model(cfg: HookedConfig, *, seed: int = 0) -> HookedCausalLM:
    """A float64 model all of whose weights, norms and biases included, are random."""
    model = HookedCausalLM(cfg).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            centre = 1.0 if name.endswith(".w") else 0.0
            one.copy_(centre + 0.3 * torch.randn(one.shape, generator=generator, dtype=torch.float64))
    return model
