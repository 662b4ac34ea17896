"""The prefix of an evaluation: run once where that gives the same numbers, else with every continuation."""

import dataclasses
import itertools
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
from hooklens.hooks.edits import Add, Edit, Project, Replace, Scale, SetComponents, Zero
from hooklens.kv_cache import HookedKeyValueCache

Text = str | Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[int | np.integer[Any]]
"""A string, or token ids `[pos]`."""

_SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What comes before the continuations.

    Attributes:
        tokens: the prefix.
        text: what the tokens were encoded from; None: they were given.
        edits: act on prefix and continuations.
        cache: the prefix's keys and values; None where sequences must run whole, see `edits_act_in_parts`.
    """

    tokens: Int[Tensor, "one pos"]
    text: str | None = None
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
    return run_prefix(model, encode_prefix(model, text, edits=edits, prepend_bos=prepend_bos))


def encode_prefix(
    model: HookedCausalLM, text: Text, *, edits: Sequence[Edit] = (), prepend_bos: bool | None = None
) -> Prefix:
    """Encode a prefix; what a tokenizer puts behind a text (an EOS, in some) is left out. Nothing runs.

    Raises:
        InputError: as `make_prefix`.
    """
    tokens = _read_row(model, text, "the prefix", prepend_bos=prepend_bos).to(model.device)
    check_edits(edits)
    return Prefix(tokens=tokens, text=text if isinstance(text, str) else None, edits=tuple(edits))


def run_prefix(model: HookedCausalLM, prefix: Prefix) -> Prefix:
    """The prefix with its cache, where it may have one."""
    if not edits_act_in_parts(model, prefix.edits):
        return prefix
    # An edit at a later token has nothing to do here.
    own = [edit for edit in prefix.edits if not isinstance(edit.pos, int) or edit.pos < len(prefix)]
    with model.hooks(edits=own):
        cache = model.prefill(prefix.tokens, attention_mask=torch.ones_like(prefix.tokens))
    return dataclasses.replace(prefix, cache=cache)


def extend_prefix(model: HookedCausalLM, prefix: Prefix, text: Text) -> Prefix:
    """The prefix with more text behind it, encoded together with it; nothing runs.

    Raises:
        InputError: the text has no token or does not go on from the prefix.
    """
    start, [row] = encode_continuations(model, prefix, [text], what=None)
    joined = prefix.text + text if isinstance(text, str) and prefix.text is not None else None
    tokens = torch.cat([start.tokens, start.tokens.new_tensor([row])], dim=1)
    return Prefix(tokens=tokens, text=joined, edits=prefix.edits)


def run_behind(model: HookedCausalLM, shared: Prefix | None, prefix: Prefix) -> Prefix:
    """A prefix with its cache; what another one has run of it is not run again.

    Raises:
        InputError: it does not fit the model.
    """
    if prefix.cache is not None:
        return prefix
    n_tokens = len(prefix)
    cache = None if shared is None else shared.cache_for(model, n_tokens + 1)
    if shared is None or cache is None:
        return run_prefix(model, prefix)
    # The last token runs in any case, for its logits.
    pairs = zip(shared.tokens[0].tolist(), prefix.tokens[0, :-1].tolist(), strict=False)
    n_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if not n_shared:
        return run_prefix(model, prefix)
    new = prefix.tokens[:, n_shared:]
    cache = cache.crop(n_shared).clone().unfreeze()
    with torch.no_grad():
        logits = model.run_with_hooks(
            new, edits=prefix.edits, attention_mask=torch.ones_like(new), past_kv_cache=cache, logits_at=-1
        )
    cache.last_logits = logits[:, 0]
    return dataclasses.replace(prefix, cache=cache.freeze())


def encode_continuations(
    model: HookedCausalLM, prefix: Prefix, texts: Sequence[Text], *, what: str | None = "continuation"
) -> tuple[Prefix, list[list[int]]]:
    """What continuations go on from, and the tokens that each adds; nothing runs.

    Text is encoded together with the prefix, without special tokens behind it. Where some text and the spaces at the
    prefix's end make tokens together, all begin before those spaces, which are then part of every continuation, as in
    lm-evaluation-harness.

    Args:
        model: encodes.
        prefix: what they are to go on from.
        texts: texts, or rows of token ids; padding of ids is left out.
        what: what messages call one of them; None: there is one, which speaks for itself.

    Raises:
        InputError: there is no token, the model has no tokenizer, what was given is no row of ids, or a text does not
            go on from the prefix; all of them are named.
    """
    border = _Border(model, prefix, [text for text in texts if isinstance(text, str)])
    rows, wrong = [], []
    for index, text in enumerate(texts):
        try:
            rows.append(border.encode(text) if isinstance(text, str) else [*border.moved_ids, *_read_ids(model, text)])
        except InputError as error:
            wrong.append(str(error) if what is None else f"{what} {index}: {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError("\n".join(wrong[:_SHOWN]) + more)
    return border.prefix, rows


def encode_in_place(model: HookedCausalLM, prefix: Prefix, text: Text) -> list[int]:
    """The tokens that a continuation adds to a prefix whose end is where it is.

    Raises:
        InputError: as `encode_continuations`, and where a text would move the prefix's end.
    """
    start, [row] = encode_continuations(model, prefix, [text], what=None)
    if len(start) != len(prefix):
        assert model.tokenizer is not None
        before = tokenization.find_text_before(model.tokenizer, prefix.tokens[0].tolist(), text=prefix.text)
        raise InputError(tokenization.describe_clash(model.tokenizer, before, str(text)))
    return row


class _Border:
    """Where a prefix ends and texts go on.

    Args:
        model: encodes.
        prefix: what the texts are to go on from.
        texts: all of them, for which there is to be one border.

    Attributes:
        prefix: what they go on from; without a cache, where that is not the prefix given.
        moved_ids: the tokens between its end and the end of the prefix given.
    """

    def __init__(self, model: HookedCausalLM, prefix: Prefix, texts: Sequence[str]) -> None:
        self._model = model
        self.prefix = prefix
        self.moved_ids: list[int] = []
        self._spaces = ""
        if model.tokenizer is None or not texts:
            return
        ids = prefix.tokens[0].tolist()
        self._before = tokenization.find_text_before(model.tokenizer, ids, text=prefix.text)
        self._rows = dict(zip(texts, tokenization.encode_behind(model.tokenizer, self._before, texts), strict=True))
        shorter = tokenization.without_last_spaces(model.tokenizer, self._before)
        if shorter is None or None not in self._rows.values():
            return
        before, spaces = shorter
        moved = tokenization.encode_behind(model.tokenizer, before, [spaces + text for text in texts])
        if None not in moved:
            self._before, self._spaces, self._rows = before, spaces, dict(zip(texts, moved, strict=True))
            self.moved_ids = ids[len(before.ids) :]
            tokens = prefix.tokens[:, : len(before.ids)]
            self.prefix = Prefix(tokens=tokens, text=before.text, edits=prefix.edits)

    def encode(self, text: str) -> list[int]:
        """The tokens that one of the texts adds.

        Raises:
            InputError: it has none, or does not go on from the prefix, or the model has no tokenizer or not its tokens.
        """
        model = self._model
        if model.tokenizer is None:
            raise InputError("text was given, but the model has no tokenizer; pass token ids")
        row = self._rows[text]
        if row is None:
            raise InputError(tokenization.describe_clash(model.tokenizer, self._before, self._spaces + text))
        if not row or not text:
            raise InputError(f"{text!r} has no token: there is nothing to score; give at least one")
        tokenization.check_encoded(model.tokenizer, [text], [row], d_vocab=model.cfg.d_vocab)
        return row


def _read_ids(model: HookedCausalLM, given: Text) -> list[int]:
    """A continuation that is token ids."""
    if isinstance(given, Sequence) and not given:
        raise InputError(f"{given!r} has no token: there is nothing to score; give at least one")
    if tokenization.is_text(given):
        raise InputError("a continuation is a list of texts; expected a text or one row of token ids")
    ids: list[int] = _read_row(model, given, "a continuation")[0].tolist()
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
        prepend_bos=model.bos_rule(prepend_bos=prepend_bos),
        closed=False,
        what=what,
    )
    if len(ids) != 1:
        raise InputError(f"{what} has shape {list(ids.shape)}; expected one row of at least one token")
    return ids if mask is None else ids[:, mask[0].bool()]


def check_edits(edits: Sequence[Edit]) -> None:
    """Check that edits may act on rows in any order.

    Raises:
        InputError: some name rows.
    """
    with_rows = [f"{type(edit).__name__}({edit.name!r})" for edit in edits if edit.rows is not None]
    if with_rows:
        raise InputError(
            f"edits {', '.join(with_rows)} name rows, but rows are continuations in an order of the engine's choosing; "
            "leave rows out"
        )


def edits_act_in_parts(model: HookedCausalLM, edits: Sequence[Edit]) -> bool:
    """Whether edits do the same to prefix and continuation run apart as to the whole sequence.

    That is certain for edits that treat each token alone (`Zero`, `Scale`, `Project`, `SetComponents`; `Replace` and
    `Add` with a number or a vector), at every position or at one counted from the front, where tensors have no `key`
    axis and keys and values are edited for all query heads that share them.
    """
    return all(_acts_in_parts(model, edit) for edit in edits)


def _acts_in_parts(model: HookedCausalLM, edit: Edit) -> bool:
    if isinstance(edit, Replace | Add):
        if isinstance(edit.value, Tensor) and edit.value.ndim > 1:
            return False
    elif not isinstance(edit, Scale | Zero | Project | SetComponents):
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
