"""Prompts as one left-padded batch, so that all rows go on at the same column."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.errors import InputError
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions

Input = str | Sequence[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"]


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
    return prompts


def _encode(model: GeneratingModel, input: Input, options: GenerationOptions) -> tuple[Tensor, Tensor | None]:
    """Ids, and which of them are tokens; None where all are."""
    tokenizer, cache = model.tokenizer, options.past_kv_cache
    mask: Tensor | None
    if isinstance(input, Tensor):
        tokenization.check_token_ids(input, model.cfg.d_vocab)
        ids = (input[None] if input.ndim == 1 else input).long()
        mask = None
        if tokenizer is not None:
            mask = tokenization.infer_attention_mask(
                ids,
                pad_token_id=tokenization.padding_token_id(tokenizer),
                bos_token_id=getattr(tokenizer, "bos_token_id", None),
                eos_token_id=getattr(tokenizer, "eos_token_id", None),
            )
    else:
        if tokenizer is None:
            raise InputError(
                "generate: text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
            )
        prepend_bos = options.prepend_bos
        if prepend_bos is None and cache is not None and len(cache):
            prepend_bos = False
        elif prepend_bos is None and input == "" and getattr(tokenizer, "bos_token_id", None) is not None:
            # Nothing to go on from: the token that opens a sequence.
            prepend_bos = True
        ids, mask = tokenization.to_tokens(
            tokenizer, input, prepend_bos=prepend_bos, padding_side="left", truncate=False, n_ctx=model.cfg.n_ctx
        )
    return ids, None if mask is None or bool(mask.all()) else mask.bool()


def _pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to the right, in their order, and cut columns without tokens."""
    order = mask.long().argsort(dim=1, stable=True)
    width = int(mask.sum(1).max())
    mask = mask.gather(1, order)[:, -width:]
    return ids.gather(1, order)[:, -width:], mask


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


def filling_token_id(model: GeneratingModel) -> int:
    """The id that stands where a row has no token: the tokenizer's padding token, or 0."""
    return 0 if model.tokenizer is None else tokenization.padding_token_id(model.tokenizer) or 0


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
