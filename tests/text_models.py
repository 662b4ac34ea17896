"""Random float64 models that read text with any tokenizer."""

from functools import cache

from transformers import PreTrainedTokenizerFast

from hooklens import HookedCausalLM, HookedConfig, RotaryPositions
from tests.tokens.kinds import make_tokenizer


def make_text_model(tokenizer: PreTrainedTokenizerFast) -> HookedCausalLM:
    """One of two layers; the large `init_std` keeps its predictions apart."""
    cfg = HookedConfig(
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_vocab=len(tokenizer),
        n_ctx=64,
        positions=RotaryPositions(dim=4),
        init_std=0.6,
    )
    model = HookedCausalLM(cfg, tokenizer=tokenizer)
    model.initialize(seed=0)
    return model.double()


@cache
def reader_of(kind: str, template: str = "none") -> HookedCausalLM:
    """A model with a tokenizer of `tests.tokens.kinds`."""
    return make_text_model(make_tokenizer(kind, template))
