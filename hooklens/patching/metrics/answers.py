"""Answers that metrics read: tokens given as ids or as texts, one for all pairs of prompts or one for each."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError

Token = int | str
Tokens = Token | Sequence[Token] | Int[Tensor, "..."]


def list_tokens(tokens: Tokens) -> list[Token]:
    """Tokens as a list of ids and texts."""
    if isinstance(tokens, Tensor):
        ids: list[Token] = tokens.reshape(-1).tolist()
        return ids
    return [tokens] if isinstance(tokens, int | str) else [one if isinstance(one, str) else int(one) for one in tokens]


def encode_tokens(model: HookedCausalLM, tokens: Tokens) -> list[int]:
    """The ids of tokens.

    Raises:
        InputError: a text that is no single token.
    """
    return [model.to_single_token(token) if isinstance(token, str) else token for token in list_tokens(tokens)]


def ids_of_pairs(
    model: HookedCausalLM, tokens: Tokens, pairs: Sequence[int], n_pairs: int, subject: str
) -> Int[Tensor, " pairs"]:
    """The ids for some of an experiment's pairs: one for all, or the pairs' own.

    Args:
        model: whose vocabulary counts.
        tokens: one token, or one for each pair of the experiment.
        pairs: the pairs wanted.
        n_pairs: how many the experiment has.
        subject: what an error calls the tokens.

    Raises:
        InputError: another number of tokens, or ids outside the vocabulary.
    """
    ids = encode_tokens(model, tokens)
    if len(ids) not in (1, n_pairs):
        raise InputError(f"{subject}: {len(ids)} tokens for {n_pairs} pairs; expected 1 or {n_pairs}")
    d_vocab = model.cfg.d_vocab
    outside = [token for token in ids if not 0 <= token < d_vocab]
    if outside:
        raise InputError(f"{subject}: token ids {outside} are outside the vocabulary, 0 to {d_vocab - 1}")
    chosen = ids if len(ids) == 1 else [ids[pair] for pair in pairs]
    return torch.tensor(chosen, device=model.device)
