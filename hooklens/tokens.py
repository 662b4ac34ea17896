"""Text to token ids and back: the BOS rule, padding, truncation, and what a batch of ids must satisfy.

Pure functions around a `transformers` tokenizer, which they never change. "BOS" is the token that opens
a sequence, "EOS" the one that closes it.

**The BOS rule** is one argument, `prepend_bos`:

- `None`: the tokenizer's own rule, with one correction: a tokenizer that adds a BOS does not add a second
  one to a text that is written with its BOS already (a rendered chat template, say).
- `True`: exactly one BOS at the front, whether the tokenizer, the text, both or neither bring it.
- `False`: none is added; one that the text itself spells out stays, being part of the text.

All three leave every other special token as the tokenizer is configured: where it appends an EOS, the
rows end in that EOS under `True` and `False` too.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.errors import InputError, join_names

PaddingSide = Literal["left", "right"]
PositionMode = Literal["first", "last"]

_SHOWN = 10


@runtime_checkable
class Tokenizer(Protocol):
    """What HookLens asks of a tokenizer; every `transformers` tokenizer has it.

    The ids `bos_token_id`, `eos_token_id`, `pad_token_id` and the string `padding_side` are read where
    they exist.
    """

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode texts; `["input_ids"]` of the result is a list of lists of ids."""

    def __len__(self) -> int:
        """How many tokens there are, added ones included."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Decode a list of ids to text."""


class TokenBatch(NamedTuple):
    """Prompts as one padded batch.

    Attributes:
        tokens: token ids.
        attention_mask: 1 where a token is part of its prompt, 0 where it is padding.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


def to_tokens(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    truncate: bool = True,
    n_ctx: int | None = None,
) -> TokenBatch:
    """Encode one prompt or a list of prompts as a padded batch, on the CPU.

    Args:
        tokenizer: encodes the text; never changed.
        text: a prompt (a batch of one) or several.
        prepend_bos: the BOS rule, see the module's description.
        padding_side: where shorter prompts are padded. None: the tokenizer's own `padding_side`.
        truncate: cut prompts longer than `n_ctx` to their first `n_ctx` tokens (so the BOS stays and an
            EOS that the tokenizer appends goes), with one warning that counts what was cut.
        n_ctx: the longest prompt allowed, in tokens with BOS. None: any length.

    Raises:
        InputError: no prompt at all, a prompt without a token, a BOS asked of a tokenizer that has none,
            an unknown padding side, or a prompt over `n_ctx` tokens with `truncate=False`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    side = _resolve_padding_side(tokenizer, padding_side)
    rows = _encode_prompts(tokenizer, texts, prepend_bos=prepend_bos)
    if n_ctx is not None:
        rows = _fit_context(rows, n_ctx, truncate=truncate)

    width = max(len(row) for row in rows)
    # Any id will do as filling, since the mask says what it is; 0 is an id that every embedding has.
    filling = padding_token_id(tokenizer) or 0
    tokens = torch.full((len(rows), width), filling, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[index, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, place] = 1
    return TokenBatch(tokens, attention_mask)


def padding_token_id(tokenizer: Tokenizer) -> int | None:
    """The id that `to_tokens` pads with: the pad token, else the EOS, else the BOS; None if it has none of them."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (token_id := _special_id(tokenizer, name)) is not None:
            return token_id
    return None


def infer_attention_mask(
    tokens: Int[Tensor, "batch pos"],
    *,
    pad_token_id: int | None,
    bos_token_id: int | None,
    eos_token_id: int | None = None,
    padding_side: PaddingSide | None = None,
) -> Int[Tensor, "batch pos"] | None:
    """The attention mask of a batch of ids that came without one; None when nothing in it is padding.

    The rule:

    1. A run of the pad id at the start of a row is padding, and so is one at the end; with a
       `padding_side`, only the run on that side. Pad ids inside a row are tokens.
    2. Where the pad id is also the BOS id and **every** row starts with it, each row has a BOS: the run at
       the start keeps its last id. If some row starts with another token, no row was given a BOS.
    3. Where the pad id is also the EOS id and **every** row ends with it, likewise: the run at the end
       keeps its first id.
    4. A row of nothing but the pad id, where that is also the BOS or the EOS, keeps one id: the last if the padding
       is on the left, the first otherwise.
    5. A single row is never padded by `to_tokens`, so a run is taken for padding only at an end where the
       pad id has no other meaning: not at the start if it is the BOS, not at the end if it is the EOS.

    Rules 2 and 3 lean on the fact that the longest row of a padded batch has no padding. The masks that
    `to_tokens` makes come back exactly, except where the ids do not tell: the pad id is also the BOS or EOS
    and some prompts, but not all, spell it out at their start or end (or spell it several times); or a row
    is only the pad id and `padding_side` is None. Pass the mask in these cases.

    Padding on the right never changes the activations of the real positions before it (attention is
    causal); there the mask matters to losses and means only. Padding on the left changes everything.

    Args:
        tokens: the batch of ids.
        pad_token_id: the id of padding, see `padding_token_id`. None: nothing is padding.
        bos_token_id: the id that opens a sequence.
        eos_token_id: the id that closes a sequence.
        padding_side: the side on which the batch was padded. None: either.
    """
    if pad_token_id is None:
        return None
    is_pad = tokens == pad_token_id
    opens, closes = pad_token_id == bos_token_id, pad_token_id == eos_token_id
    if not bool(is_pad.any()) or (len(tokens) == 1 and (opens or closes) and bool(is_pad.all())):
        return None
    padding = _find_padding(is_pad, opens=opens, closes=closes, padding_side=padding_side)
    return (~padding).long() if bool(padding.any()) else None


def _find_padding(
    is_pad: Bool[Tensor, "batch pos"], *, opens: bool, closes: bool, padding_side: PaddingSide | None
) -> Bool[Tensor, "batch pos"]:
    """Apply the rule of `infer_attention_mask`; `opens` and `closes`: the pad id is also the BOS, the EOS."""
    single_row = len(is_pad) == 1
    padding = torch.zeros_like(is_pad)
    # A run shifted by one position spares the id at its inner end, the BOS or EOS.
    if padding_side != "right" and not (single_row and opens):
        run = is_pad.long().cumprod(dim=1).bool()
        kept = int(opens and bool(is_pad[:, 0].all()))
        padding[:, : is_pad.shape[1] - kept] |= run[:, kept:]
    if padding_side != "left" and not (single_row and closes):
        run = is_pad.long().flip(1).cumprod(dim=1).flip(1).bool()
        kept = int(closes and bool(is_pad[:, -1].all()))
        padding[:, kept:] |= run[:, : is_pad.shape[1] - kept]

    only_pad = is_pad.all(dim=1)
    if (opens or closes) and bool(only_pad.any()):
        others = padding[~only_pad]
        on_the_left = bool(others[:, 0].any()) and not bool(others[:, -1].any())
        if padding_side is not None:
            on_the_left = padding_side == "left"
        padding[only_pad] = True
        padding[only_pad, -1 if on_the_left else 0] = False
    return padding


def check_token_ids(tokens: Tensor, d_vocab: int) -> None:
    """Check that a tensor can be run as token ids `[pos]` or `[batch pos]`.

    Raises:
        InputError: not an integer dtype, no or more than two axes, empty, or ids outside `[0, d_vocab)`.
    """
    # A plain Tensor annotation: any other shape or dtype is for this function to refuse, in its own words.
    if not _is_integer(tokens):
        raise InputError(
            f"token ids have dtype {tokens.dtype}; expected an integer dtype such as torch.int64 "
            "(a residual stream goes in with start_at_layer=)"
        )
    if tokens.ndim not in (1, 2):
        raise InputError(f"token ids have shape {list(tokens.shape)}; expected [pos] or [batch pos]")
    if tokens.numel() == 0:
        raise InputError(f"token ids are empty (shape {list(tokens.shape)}, an empty prompt); give at least one token")
    smallest, largest = torch.aminmax(tokens)
    if int(smallest) >= 0 and int(largest) < d_vocab:
        return
    rows = tokens if tokens.ndim == 2 else tokens[None]
    offenders = ((rows < 0) | (rows >= d_vocab)).nonzero().tolist()
    shown = ", ".join(f"{int(rows[row, pos])} (row {row}, position {pos})" for row, pos in offenders[:_SHOWN])
    more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
    raise InputError(
        f"token ids outside the vocabulary: {shown}{more}; this model has d_vocab={d_vocab}, ids 0 to {d_vocab - 1}. "
        "Was the text encoded with another model's tokenizer?"
    )


def to_string(tokenizer: Tokenizer, tokens: int | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
    """Decode ids to text, special tokens included: a string for one row or one id, a list for `[batch pos]`.

    Raises:
        InputError: the tokens are no ids.
    """
    rows, is_batch = _read_ids(tokens)
    texts = [_decode(tokenizer, row) for row in rows]
    return texts if is_batch else texts[0]


def to_str_tokens(
    tokenizer: Tokenizer,
    input: str | Tensor | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    prepend_bos: bool | None = None,
) -> list[str] | list[list[str]]:
    """The tokens of a prompt as strings, each decoded alone; a list of such lists for several prompts.

    There are as many strings as tokens: one that holds a part of a character shows as the replacement
    character U+FFFD. Prompts of a list are not padded.

    Args:
        tokenizer: encodes and decodes.
        input: a prompt, a list of prompts, or ids `[pos]` or `[batch pos]`.
        prepend_bos: the BOS rule for text; ids are taken as they are.

    Raises:
        InputError: an empty prompt, a BOS asked of a tokenizer that has none, or what is no ids.
    """
    rows, is_batch = _read_input(tokenizer, input, prepend_bos=prepend_bos)
    pieces = [_decode_each(tokenizer, row) for row in rows]
    return pieces if is_batch else pieces[0]


def to_single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is exactly one token; nothing is added to the text, no space and no BOS.

    Raises:
        InputError: the text is no token or several; the message names the pieces.
    """
    [ids] = _encode(tokenizer, [text], add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    found = f"{len(ids)} tokens: {join_names(_decode_each(tokenizer, ids))}" if ids else "no token at all"
    bare = text.strip()
    variants = [variant for variant in (f" {bare}", bare) if bare and variant != text]
    lengths = [len(ids) for ids in _encode(tokenizer, variants, add_special_tokens=False)] if variants else []
    single = [repr(variant) for variant, length in zip(variants, lengths, strict=True) if length == 1]
    hint = f" {' or '.join(single)} is one (mind the space)." if single else ""
    raise InputError(f"{text!r} is {found}; expected a text that is a single token.{hint}")


def to_single_str_token(tokenizer: Tokenizer, token: int) -> str:
    """The string of one token id.

    Raises:
        InputError: the tokenizer has no such id.
    """
    if not 0 <= token < len(tokenizer):
        raise InputError(
            f"token id {token} is not in the tokenizer's vocabulary; its ids are 0 to {len(tokenizer) - 1}"
        )
    return _decode(tokenizer, [token])


def get_token_position(
    tokenizer: Tokenizer,
    single_token: str | int,
    input: str | Tensor | Sequence[int],
    *,
    mode: PositionMode = "first",
    prepend_bos: bool | None = None,
) -> int:
    """The position of a token in a prompt, counted from 0 with the BOS where there is one.

    Args:
        tokenizer: encodes and decodes.
        single_token: the token, as an id or as a text that is a single token.
        input: a prompt, or ids `[pos]` or `[1 pos]`.
        mode: which occurrence, `"first"` or `"last"`.
        prepend_bos: the BOS rule for text; ids are taken as they are.

    Raises:
        InputError: the token is not in the prompt, the text is not one token, or the input is several rows.
    """
    if mode not in get_args(PositionMode):
        raise InputError(f"get_token_position: mode is {mode!r}; expected 'first' or 'last'")
    rows, _ = _read_input(tokenizer, input, prepend_bos=prepend_bos)
    if len(rows) != 1:
        raise InputError(f"get_token_position: the input has {len(rows)} rows; expected a single prompt")
    [ids] = rows
    token = to_single_token(tokenizer, single_token) if isinstance(single_token, str) else single_token
    if token not in ids:
        pieces = join_names(_decode_each(tokenizer, ids))
        wanted = f"{single_token!r} (id {token})" if isinstance(single_token, str) else f"id {token}"
        raise InputError(f"get_token_position: token {wanted} is not in the prompt, whose tokens are {pieces}")
    return ids.index(token) if mode == "first" else len(ids) - 1 - ids[::-1].index(token)


def _special_id(tokenizer: Tokenizer, name: str) -> int | None:
    token_id: int | None = getattr(tokenizer, name, None)
    return token_id


def _resolve_padding_side(tokenizer: Tokenizer, padding_side: PaddingSide | None) -> PaddingSide:
    side = padding_side if padding_side is not None else getattr(tokenizer, "padding_side", "right")
    for choice in get_args(PaddingSide):
        if side == choice:
            resolved: PaddingSide = choice
            return resolved
    raise InputError(f"padding_side is {side!r}; expected 'left' or 'right'")


def _encode(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    encoding = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoding["input_ids"]]


def _encode_prompts(tokenizer: Tokenizer, texts: list[str], *, prepend_bos: bool | None) -> list[list[int]]:
    """Encode under the BOS rule, rows of different lengths, and refuse prompts that have no token."""
    if not texts:
        raise InputError("no prompt was given: the list of texts is empty")
    strange = [
        f"{type(text).__name__} (prompt {index})" for index, text in enumerate(texts) if not isinstance(text, str)
    ]
    if strange:
        raise InputError(f"prompts are not strings: {', '.join(strange[:_SHOWN])}; token ids go in as a tensor")
    rows = _apply_bos_rule(tokenizer, texts, prepend_bos=prepend_bos)
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        has_bos = _special_id(tokenizer, "bos_token_id") is not None
        remedy = "give some text, or prepend_bos=True" if has_bos else "give some text"
        raise InputError(f"empty prompt: prompt {', '.join(map(str, empty))} of {len(texts)} has no token; {remedy}")
    return rows


def _apply_bos_rule(tokenizer: Tokenizer, texts: list[str], *, prepend_bos: bool | None) -> list[list[int]]:
    bos = _special_id(tokenizer, "bos_token_id")
    rows = _encode(tokenizer, texts, add_special_tokens=True)
    if bos is None:
        if prepend_bos:
            raise InputError(
                "prepend_bos=True: this tokenizer has no BOS token; set tokenizer.bos_token, or leave it None"
            )
        return rows
    if prepend_bos is None and not any(row[:2] == [bos, bos] for row in rows):
        return rows

    tokenizer_adds = _adds_bos(tokenizer, bos, texts)
    # How many BOS tokens the text itself spells out at its start.
    spelled = [_count_leading(ids, bos) for ids in _encode(tokenizer, texts, add_special_tokens=False)]
    without_added = [row[1:] if tokenizer_adds else row for row in rows]
    if prepend_bos is None:
        return [bare if count else row for row, bare, count in zip(rows, without_added, spelled, strict=True)]
    if prepend_bos:
        return [[bos, *bare[count:]] for bare, count in zip(without_added, spelled, strict=True)]
    return without_added


def _adds_bos(tokenizer: Tokenizer, bos: int, texts: list[str]) -> bool:
    """Whether the tokenizer puts a BOS in front of what it encodes.

    Found out by encoding, since tokenizers keep the rule in different places. A text that has a token other
    than the BOS decides: with BOS and EOS the same id, an empty one cannot tell a front from an end.
    """
    opens = False
    for probe in (*texts, "a", "0"):
        [bare] = _encode(tokenizer, [probe], add_special_tokens=False)
        [full] = _encode(tokenizer, [probe], add_special_tokens=True)
        opens = _count_leading(full, bos) > _count_leading(bare, bos)
        if any(token != bos for token in bare):
            break
    return opens


def _count_leading(ids: list[int], token: int) -> int:
    return next((index for index, found in enumerate(ids) if found != token), len(ids))


def _fit_context(rows: list[list[int]], n_ctx: int, *, truncate: bool) -> list[list[int]]:
    over = {index: len(row) for index, row in enumerate(rows) if len(row) > n_ctx}
    if not over:
        return rows
    lengths = ", ".join(f"prompt {index}: {length}" for index, length in list(over.items())[:_SHOWN])
    if not truncate:
        raise InputError(
            f"{len(over)} of {len(rows)} prompts are longer than n_ctx={n_ctx} tokens ({lengths}); "
            "shorten them, or pass truncate=True to cut them"
        )
    cut = sum(length - n_ctx for length in over.values())
    warnings.warn(
        f"to_tokens cut {cut} tokens from the end of {len(over)} of {len(rows)} prompts "
        f"to fit n_ctx={n_ctx} ({lengths})",
        UserWarning,
        stacklevel=3,
    )
    return [row[:n_ctx] for row in rows]


def _read_input(tokenizer: Tokenizer, input: Any, *, prepend_bos: bool | None) -> tuple[list[list[int]], bool]:
    """Rows of ids from text or ids, and whether the input was a batch."""
    if isinstance(input, str):
        return _encode_prompts(tokenizer, [input], prepend_bos=prepend_bos), False
    if isinstance(input, Sequence) and input and isinstance(input[0], str):
        return _encode_prompts(tokenizer, list(input), prepend_bos=prepend_bos), True
    return _read_ids(input)


def _read_ids(tokens: Any) -> tuple[list[list[int]], bool]:
    """Rows of ids from an int, a tensor or nested lists, and whether they were a batch `[batch pos]`."""
    if isinstance(tokens, int):
        tokens = [tokens]
    if isinstance(tokens, Tensor):
        if not _is_integer(tokens) or tokens.ndim > 2:
            raise InputError(
                f"token ids have shape {list(tokens.shape)} and dtype {tokens.dtype}; "
                "expected integers [pos] or [batch pos]"
            )
        is_batch = tokens.ndim == 2
        rows = tokens.tolist() if is_batch else [tokens.reshape(-1).tolist()]
    else:
        is_batch = len(tokens) > 0 and not isinstance(tokens[0], int)
        rows = [list(row) for row in tokens] if is_batch else [list(tokens)]
    negative = sorted({token for row in rows for token in row if token < 0})
    if negative:
        raise InputError(f"token ids are negative: {', '.join(map(str, negative[:_SHOWN]))}; expected ids from 0 on")
    return rows, is_batch


def _is_integer(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _decode_each(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    strings = {token: _decode(tokenizer, [token]) for token in set(ids)}
    return [strings[token] for token in ids]
