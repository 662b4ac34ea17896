"""Random models that read text, with the word-level tokenizer of the bundled checkpoints."""

from hooklens import HookedCausalLM, HookedConfig, RotaryPositions
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.bundled.words import VOCABULARY


def make_word_model(*, d_model: int, n_ctx: int, init_std: float) -> HookedCausalLM:
    """A float32 model of two layers; a large `init_std` keeps its predictions apart."""
    cfg = HookedConfig(
        d_model=d_model,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_vocab=len(VOCABULARY),
        n_ctx=n_ctx,
        positions=RotaryPositions(dim=d_model // 4),
        init_std=init_std,
    )
    model = HookedCausalLM(cfg, tokenizer=build_tokenizer(n_ctx=n_ctx))
    model.initialize(seed=0)
    return model
