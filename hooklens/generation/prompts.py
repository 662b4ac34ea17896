"""Prompts as one left-padded batch, so that all rows go on at the same column."""

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.errors import InputError
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions

Input = tokenization.Prompt

_MOST_BYTES = 2**40
# The generator of a row's draws keeps 2.5 KB of state.
_BYTES_OF_A_ROW = 2500


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one generation.

    Attributes:
        ids: `[batch pos]`, on the model's device, padding on the left.
        mask: which of them are tokens; None: all.
        lengths: tokens of each prompt.
        n_before: tokens of each prompt's row in the key-value cache it goes on from.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None
    lengths: list[int]
    n_before: list[int]

    @property
    def padding(self) -> list[int]:
        """Columns of padding before each prompt."""
        return [self.ids.shape[1] - length for length in self.lengths]


def read_prompts(model: GeneratingModel, input: Input, options: GenerationOptions) -> Prompts:
    """Encode, pad on the left, and check that everything fits the model's context and the cache.

    Raises:
        InputError: no tokens, text without a tokenizer, ids outside the vocabulary, or more tokens than `n_ctx`.
        CacheError: the key-value cache is another model's, or serves other rows.
    """
    cache = options.past_kv_cache
    ids, mask = _encode(model, input, options)
    if cache is not None:
        cache.check_fits(model.cfg, transforms=model.transforms, device=model.device, dtype=model.dtype, batch=len(ids))
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    if mask is not None:
        ids, mask = _pad_left(ids, mask)
    past = [0] if cache is None else cache.previous_attention_mask.sum(1).tolist()
    prompts = Prompts(
        ids=ids.to(model.device),
        mask=None if mask is None else mask.to(model.device),
        lengths=lengths,
        n_before=past if len(past) == len(ids) else past * len(ids),
    )
    _check_context(prompts, options.max_new_tokens, model.cfg.n_ctx)
    _check_size(model, prompts, options)
    return prompts


def _encode(model: GeneratingModel, input: Input, options: GenerationOptions) -> tuple[Tensor, Tensor | None]:
    """Ids, and which of them are tokens; None where all are."""
    tokenizer, cache = model.tokenizer, options.past_kv_cache
    prepend_bos = options.prepend_bos
    if prepend_bos is None and cache is not None and len(cache):
        prepend_bos = False
    elif prepend_bos is None and _is_nothing(input) and getattr(tokenizer, "bos_token_id", None) is not None:
        # Nothing to go on from: the token that opens a sequence.
        prepend_bos = True
    is_text = tokenization.is_text(input)
    if is_text and tokenizer is None:
        raise InputError(
            "generate: text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
        )
    ids, mask = tokenization.read_tokens(
        input,
        tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        prepend_bos=prepend_bos,
        # Ids may be padded at both ends.
        padding_side="left" if is_text else None,
    )
    tokenization.check_has_values(ids, model.device)
    return ids, None if mask is None else mask.bool()


def _is_nothing(input: Input) -> bool:
    return isinstance(input, str) and not input


def _pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to the right, in their order, and cut columns without tokens."""
    order = mask.long().argsort(dim=1, stable=True)
    width = int(mask.sum(1).max())
    mask = mask.gather(1, order)[:, -width:]
    return ids.gather(1, order.to(ids.device))[:, -width:], mask


def _check_context(prompts: Prompts, max_new_tokens: int, n_ctx: int) -> None:
    needed = [
        before + length + max_new_tokens for before, length in zip(prompts.n_before, prompts.lengths, strict=True)
    ]
    over = [row for row, total in enumerate(needed) if total > n_ctx]
    if not over:
        return
    row = max(over, key=lambda index: needed[index])
    before = f"{prompts.n_before[row]} tokens in past_kv_cache, " if prompts.n_before[row] else ""
    others = f" (and {len(over) - 1} more rows)" if len(over) > 1 else ""
    raise InputError(
        f"generate: row {row} has {before}{prompts.lengths[row]} prompt tokens and max_new_tokens={max_new_tokens}, "
        f"{needed[row]} positions in all, the model has n_ctx={n_ctx}{others}; ask for fewer new tokens or shorten the "
        "prompt"
    )


def _check_size(model: GeneratingModel, prompts: Prompts, options: GenerationOptions) -> None:
    """Refuse more rows than any machine could hold, before the first is made."""
    cfg = model.cfg
    rows = len(prompts.lengths) * options.num_return_sequences
    width = prompts.ids.shape[1] + options.max_new_tokens
    cached = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * model.dtype.itemsize * options.use_past_kv_cache
    # What has to be there at one time: a row's ids and keys and values, and its logits of a step in float32.
    needed = rows * (_BYTES_OF_A_ROW + width * (8 + cached) + 4 * cfg.d_vocab)
    if needed > _MOST_BYTES:
        raise InputError(
            f"generate: {len(prompts.lengths)} prompts with num_return_sequences={options.num_return_sequences} are "
            f"{rows} rows of up to {width} tokens, which need {needed} bytes at one time ({needed / 2**40:.1f} TiB); "
            "ask for fewer, in several calls"
        )


def filling_token_id(model: GeneratingModel) -> int:
    """The id that stands where a row has no token: the tokenizer's padding token, or 0 where the model lacks it."""
    padding = None if model.tokenizer is None else tokenization.padding_token_id(model.tokenizer)
    return padding if padding is not None and padding < model.cfg.d_vocab else 0


def end_token_ids(model: GeneratingModel, options: GenerationOptions) -> list[int]:
    """The tokens that end a row; empty when none does.

    Raises:
        InputError: an id outside the vocabulary.
    """
    if not options.stop_at_eos:
        return []
    given = options.eos_token_id
    if given is None:
        found = getattr(model.tokenizer, "eos_token_id", None)
        return [] if found is None else [found]
    ids = [given] if isinstance(given, int) else list(given)
    outside = [token for token in ids if not 0 <= token < model.cfg.d_vocab]
    if outside:
        raise InputError(
            f"generate: eos_token_id holds {outside}, outside the vocabulary; ids are 0 to {model.cfg.d_vocab - 1}"
        )
    return ids
