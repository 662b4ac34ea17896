"""Names of tokens in tables: their text, where they have one."""

from jaxtyping import Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM


def name_tokens(model: HookedCausalLM, ids: Int[Tensor, " k"]) -> tuple[str | int, ...]:
    """The text of each token.

    An id stands for itself without a tokenizer, and where the tokenizer ends: embeddings are often padded with
    rows that no token uses.
    """
    n_named = 0 if model.tokenizer is None else len(model.tokenizer)
    return tuple(model.to_single_str_token(token) if token < n_named else token for token in ids.tolist())
