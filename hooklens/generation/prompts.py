"""Prompts as one left-padded batch, so that all rows go on at the same column."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions, read_end_tokens
from hooklens.generation.past import read_past

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
        before: those tokens; None: the cache does not know them.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None
    lengths: list[int]
    n_before: list[int]
    before: list[list[int]] | None = None

    @property
    def padding(self) -> list[int]:
        """Columns of padding before each prompt."""
        return [self.ids.shape[1] - length for length in self.lengths]

    def tokens_before(self, row: int) -> list[int]:
        """The tokens in a row's key-value cache, where it knows them."""
        return [] if self.before is None else self.before[row]

    def sequence(self, row: int) -> list[int]:
        """All tokens of a row: those in the cache, where it knows them, and the prompt's."""
        return [*self.tokens_before(row), *self.ids[row, self.padding[row] :].tolist()]


def read_prompts(model: GeneratingModel, input: Input, options: GenerationOptions) -> Prompts:
    """Encode, pad on the left, and check that everything fits the model's context and the cache.

    Raises:
        InputError: no tokens, text without a tokenizer, ids outside the vocabulary, or more tokens than `n_ctx`.
        CacheError: the key-value cache is another model's, or serves other rows.
    """
    _require_causal(model)
    refuse_other_outputs(model.cfg, "generate", InputError)
    cache = options.past_kv_cache
    ids, mask = _encode(model, input, options)
    if cache is not None:
        cache.check_fits(
            model.cfg,
            transforms=model.transforms,
            adapters=model.active_adapters,
            device=model.cache_device,
            dtype=model.dtype,
            batch=len(ids),
        )
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    if mask is not None:
        ids, mask = _pad_left(ids, mask)
    past = [0]
    before: list[list[int]] | None = [[]]
    if cache is not None:
        past = cache.previous_attention_mask.sum(1).tolist()
        before = None if cache.token_ids is None else cache.token_rows()
    seen = past if cache is None or cache.document_ids is None else cache.continued_lengths.tolist()
    prompts = Prompts(
        ids=ids.to(model.device),
        mask=None if mask is None else mask.to(model.device),
        lengths=lengths,
        n_before=past if len(past) == len(ids) else past * len(ids),
        before=before if before is None or len(before) == len(ids) else before * len(ids),
    )
    seen = seen if len(seen) == len(ids) else seen * len(ids)
    _check_context(prompts, seen, options.max_new_tokens, model.cfg.n_ctx)
    _check_size(model, prompts, options)
    return prompts


def _require_causal(model: GeneratingModel) -> None:
    if not model.cfg.causal:
        raise InputError(
            "generate: this network is not causal (cfg.causal=False): what it gives at a token depends on the later "
            "ones, so it has no next token to draw. Read its logits at the tokens that there are, model(input)"
        )


def join_sequences(prompts: Prompts) -> Int[Tensor, "batch pos"]:
    """The prompts behind the tokens in the key-value cache, padding on the left.

    Raises:
        InputError: the cache does not know its tokens.
    """
    if not any(prompts.n_before):
        return prompts.ids
    if prompts.before is None:
        raise InputError(
            "generate: repetition_penalty, freq_penalty, logits_processor and stopping_criteria look at all tokens of "
            "a row, and past_kv_cache does not know those it holds (it was filled from a residual stream or by hand, "
            "or saved without them); make it with model.prefill(prefix), or tell it: cache.token_ids = ids [batch pos]"
        )
    ends = [before + length for before, length in zip(prompts.n_before, prompts.lengths, strict=True)]
    joined = prompts.ids.new_zeros(len(ends), max(ends))
    for row, end in enumerate(ends):
        joined[row, joined.shape[1] - end :] = torch.tensor(prompts.sequence(row), device=joined.device)
    return joined


def _encode(model: GeneratingModel, input: Input, options: GenerationOptions) -> tuple[Tensor, Tensor | None]:
    """Ids, and which of them are tokens; None where all are."""
    tokenizer, cache = model.tokenizer, options.past_kv_cache
    prepend_bos = options.prepend_bos
    begins = cache is None or not len(cache)
    if prepend_bos is None and begins and _is_nothing(input) and getattr(tokenizer, "bos_token_id", None) is not None:
        # Nothing to go on from: the token that opens a sequence.
        prepend_bos = True
    is_text = tokenization.is_text(input)
    if is_text and tokenizer is None:
        raise InputError(
            "generate: text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
        )
    past = read_past(model, input, cache)
    ids, mask = tokenization.read_tokens(
        input,
        tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        prepend_bos=model.bos_rule(prepend_bos=prepend_bos, begins=past is None),
        # Ids may be padded at both ends.
        padding_side="left" if is_text else None,
        past=past,
        closed=False,
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


def _check_context(prompts: Prompts, n_seen: list[int], max_new_tokens: int, n_ctx: int) -> None:
    """Check that the positions suffice, where prompts go on from so many tokens of the cache."""
    needed = [seen + length + max_new_tokens for seen, length in zip(n_seen, prompts.lengths, strict=True)]
    over = [row for row, total in enumerate(needed) if total > n_ctx]
    if not over:
        return
    row = max(over, key=lambda index: needed[index])
    before = f"{n_seen[row]} tokens in past_kv_cache, " if n_seen[row] else ""
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
    cached = cfg.cache_width * model.dtype.itemsize * options.use_past_kv_cache
    # What has to be there at one time: a row's ids and keys and values, and its logits of a step in float32.
    needed = rows * (_BYTES_OF_A_ROW + width * (8 + cached) + 4 * cfg.d_vocab)
    if needed > _MOST_BYTES:
        raise InputError(
            f"generate: {len(prompts.lengths)} prompts with num_return_sequences={options.num_return_sequences} are "
            f"{rows} rows of up to {width} tokens, which need {needed} bytes at one time ({needed / 2**40:.1f} TiB); "
            "ask for fewer, in several calls"
        )


def filling_token_id(model: GeneratingModel) -> int:
    """The id that stands where a row has no token: the checkpoint's padding token, the tokenizer's, or 0."""
    found = [model.generation_config.get("pad_token_id")]
    if model.tokenizer is not None:
        found.append(tokenization.padding_token_id(model.tokenizer))
    return next((token for token in found if type(token) is int and 0 <= token < model.cfg.d_vocab), 0)


def end_token_ids(model: GeneratingModel, options: GenerationOptions) -> list[int]:
    """The tokens that end a row: those given, the checkpoint's, or the tokenizer's; empty when none does.

    Raises:
        InputError: an id outside the vocabulary.
    """
    if not options.stop_at_eos:
        return []
    given = options.eos_token_id
    if given is None:
        found = model.generation_config.get("eos_token_id")
        if found is None:
            found = getattr(model.tokenizer, "eos_token_id", None)
        if found is None or found == []:
            return []
        ends = read_end_tokens(found, what="generate: eos_token_id of model.generation_config or model.tokenizer")
        return [ends] if isinstance(ends, int) else ends
    ids = [given] if isinstance(given, int) else list(given)
    outside = [token for token in ids if not 0 <= token < model.cfg.d_vocab]
    if outside:
        raise InputError(
            f"generate: eos_token_id holds {outside}, outside the vocabulary; ids are 0 to {model.cfg.d_vocab - 1}"
        )
    return ids
