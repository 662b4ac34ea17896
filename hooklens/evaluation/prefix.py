"""The prefix of an evaluation: run once where that gives the same numbers, else with every continuation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Add, Edit, Project, Replace, Scale, Zero
from hooklens.kv_cache import HookedKeyValueCache

Text = str | Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[int | np.integer[Any]]
"""A string, or token ids `[pos]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What comes before the continuations.

    Attributes:
        tokens: the prefix.
        edits: act on prefix and continuations.
        cache: the prefix's keys and values; None where sequences must run whole, see `edits_act_in_parts`.
    """

    tokens: Int[Tensor, "one pos"]
    edits: tuple[Edit, ...] = ()
    cache: HookedKeyValueCache | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def cache_for(self, model: HookedCausalLM, n_tokens: int) -> HookedKeyValueCache | None:
        """The cache, or None where a sequence of so many tokens must run whole.

        That is so where its length decides the rotary frequencies (dynamic scaling), and where an edit names a
        token that does not run on the cache: the last one, whose successor nobody asks for, or none at all.
        """
        if model.depends_on_length(n_tokens):
            return None
        if any(isinstance(edit.pos, int) and edit.pos >= n_tokens - 1 for edit in self.edits):
            return None
        return self.cache


def make_prefix(
    model: HookedCausalLM, text: Text, *, edits: Sequence[Edit] = (), prepend_bos: bool | None = None
) -> Prefix:
    """Encode a prefix and run it.

    Raises:
        InputError: the prefix has no token, several rows, or does not fit the model; an edit names rows.
    """
    tokens = _encode_prefix(model, text, prepend_bos=prepend_bos)
    _check_edits(edits)
    if not edits_act_in_parts(model, edits):
        return Prefix(tokens=tokens, edits=tuple(edits))
    # An edit at a later token has nothing to do here.
    own = [edit for edit in edits if not isinstance(edit.pos, int) or edit.pos < tokens.shape[1]]
    with model.hooks(edits=own):
        cache = model.prefill(tokens, attention_mask=torch.ones_like(tokens))
    return Prefix(tokens=tokens, edits=tuple(edits), cache=cache)


def extend_prefix(model: HookedCausalLM, prefix: Prefix, text: Text) -> Prefix:
    """The prefix with more text behind it, encoded alone and without BOS; only the new tokens run.

    Raises:
        InputError: the text has no token, or the whole does not fit the model.
    """
    new = torch.tensor([encode_continuation(model, text)], device=model.device)
    tokens = torch.cat([prefix.tokens, new], dim=1)
    shared = prefix.cache_for(model, tokens.shape[1] + 1)
    if shared is None:
        return make_prefix(model, tokens, edits=prefix.edits)
    cache = shared.clone().unfreeze()
    with torch.no_grad():
        logits = model.run_with_hooks(
            new, edits=prefix.edits, attention_mask=torch.ones_like(new), past_kv_cache=cache, logits_at=-1
        )
    cache.last_logits = logits[:, 0]
    return Prefix(tokens=tokens, edits=prefix.edits, cache=cache.freeze())


def encode_continuation(model: HookedCausalLM, text: Text) -> list[int]:
    """The token ids of text that goes on: encoded alone, no special token added. Padding of ids is left out.

    Raises:
        InputError: there is no token, the model has no tokenizer, or what was given is no row of ids.
    """
    if isinstance(text, str):
        if model.tokenizer is None:
            raise InputError("text was given, but the model has no tokenizer; pass token ids")
        ids = tokenization.encode_continuation(model.tokenizer, text, d_vocab=model.cfg.d_vocab)
    elif isinstance(text, Sequence) and not text:
        ids = []
    elif tokenization.is_text(text):
        raise InputError("a continuation is a list of texts; expected a text or one row of token ids")
    else:
        ids = _read_row(model, text, "a continuation")[0].tolist()
    if not ids:
        raise InputError(f"{text!r} has no token: there is nothing to score; give at least one")
    return ids


def _read_row(
    model: HookedCausalLM, text: Text, what: str, *, prepend_bos: bool | None = None
) -> Int[Tensor, "one pos"]:
    """The tokens of one row, as a call of the model takes them."""
    ids, mask = tokenization.read_tokens(
        text,
        model.tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        prepend_bos=prepend_bos,
        what=what,
    )
    if len(ids) != 1:
        raise InputError(f"{what} has shape {list(ids.shape)}; expected one row of at least one token")
    return ids if mask is None else ids[:, mask[0].bool()]


def _encode_prefix(model: HookedCausalLM, text: Text, *, prepend_bos: bool | None) -> Int[Tensor, "one pos"]:
    return _read_row(model, text, "the prefix", prepend_bos=prepend_bos).to(model.device)


def _check_edits(edits: Sequence[Edit]) -> None:
    with_rows = [f"{type(edit).__name__}({edit.name!r})" for edit in edits if edit.rows is not None]
    if with_rows:
        raise InputError(
            f"edits {', '.join(with_rows)} name rows, but rows are continuations in an order of the engine's choosing; "
            "leave rows out"
        )


def edits_act_in_parts(model: HookedCausalLM, edits: Sequence[Edit]) -> bool:
    """Whether edits do the same to prefix and continuation run apart as to the whole sequence.

    That is certain for edits that treat each token alone (`Zero`, `Scale`, `Project`; `Replace` and `Add` with a
    number or a vector), at every position or at one counted from the front, where tensors have no `key` axis and keys
    and values are edited for all query heads that share them.
    """
    return all(_acts_in_parts(model, edit) for edit in edits)


def _acts_in_parts(model: HookedCausalLM, edit: Edit) -> bool:
    if isinstance(edit, Replace | Add):
        if isinstance(edit.value, Tensor) and edit.value.ndim > 1:
            return False
    elif not isinstance(edit, Scale | Zero | Project):
        return False
    if not (edit.pos is None or (isinstance(edit.pos, int) and edit.pos >= 0)):
        return False
    for point in model.find_edit_points(edit).values():
        site = point.site
        # What single query heads read of keys and values is in no cache.
        if site is None or "key" in site.axes or site.repeats is not None:
            return False
        # Of the prefix only the last position is unembedded, so others cannot be found there.
        if site.template.startswith("unembed.") and edit.pos is not None:
            return False
    return True
