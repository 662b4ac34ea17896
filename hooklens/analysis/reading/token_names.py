"""Tokens as callers name them and as tables show them."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_int, read_numbers
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError

Tokens = object
"""A token or several: text, an id, or a list, array or tensor of ids; a list may mix ids and texts."""


def name_tokens(model: HookedCausalLM, ids: Int[Tensor, " k"]) -> tuple[str | int, ...]:
    """The text of each token.

    An id stands for itself without a tokenizer, and where the tokenizer ends: embeddings are often padded with
    rows that no token uses.
    """
    n_named = 0 if model.tokenizer is None else len(model.tokenizer)
    return tuple(model.to_single_str_token(token) if token < n_named else token for token in ids.tolist())


def read_token(model: HookedCausalLM, given: object, *, what: str) -> int:
    """The id of one token, given as text or id.

    Raises:
        InputError: the text is not one token, or the id is none of the vocabulary's.
    """
    token = model.to_single_token(given) if isinstance(given, str) else read_int(given, what=what)
    if not 0 <= token < model.cfg.d_vocab:
        raise InputError(f"{what}={token}; expected a token id from 0 to {model.cfg.d_vocab - 1}")
    return token


def read_outputs(model: HookedCausalLM, given: object, *, what: str) -> Int[Tensor, "..."]:
    """Which logits are meant: tokens as `read_tokens` reads them, or in a classifier the numbers of outputs.

    Raises:
        InputError: no tokens, or no outputs of the model.
    """
    if model.cfg.d_vocab_out == model.cfg.d_vocab:
        return read_tokens(model, given, what=what)
    if isinstance(given, str) or (isinstance(given, list | tuple) and any(isinstance(one, str) for one in given)):
        refuse_other_outputs(model.cfg, f"{what}: texts are tokens; give the numbers of outputs", InputError)
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        given = torch.tensor(int(given))
    return _read_ids(given, model.cfg.d_vocab_out, f"outputs from 0 to {model.cfg.d_vocab_out - 1}", what=what)


def read_tokens(model: HookedCausalLM, given: object, *, what: str) -> Int[Tensor, "..."]:
    """Token ids of any shape, given as text, ids, or lists of both.

    Raises:
        InputError: a text is not one token, or there are ids outside the vocabulary, or none.
    """
    if isinstance(given, str):
        given = model.to_single_token(given)
    if isinstance(given, list | tuple):
        given = [model.to_single_token(one) if isinstance(one, str) else one for one in given]
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return torch.tensor(read_token(model, given, what=what))
    expected = f"token ids from 0 to {model.cfg.d_vocab - 1}, or texts of one token each"
    return _read_ids(given, model.cfg.d_vocab, expected, what=what)


def _read_ids(given: object, n: int, expected: str, *, what: str) -> Int[Tensor, "..."]:
    ids = read_numbers(given, what=what, expected=expected)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise InputError(f"{what} holds {ids.tolist()!r:.80}; expected {expected}")
    ids = ids.long()
    if not bool(((ids >= 0) & (ids < n)).all()):
        raise InputError(f"{what} holds {ids.tolist()!r:.80}; expected {expected}")
    return ids
