"""Sanity checks: numbers that tell whether a model, a conversion or an ablation works at all.

- `corpus_loss`: mean cross-entropy of the next token on texts, in nats. A model that was converted wrongly is
  near `ln(d_vocab)`; a model that works is far below it on text like what it was trained on.
- `induction_loss`: the same on random tokens and on their repetition (Olsson et al. 2022, "In-context Learning
  and Induction Heads"). The first half cannot be predicted; a second half well below it shows that the model
  copies from its context, and heads whose ablation raises it are what it copies with.
- `indirect_object_task`: sentences such as "When Mary and John went to the store, John gave a drink to", whose
  next word is the other name (Wang et al. 2022, "Interpretability in the wild"). The logit of the right name
  minus that of the repeated one is above 0 for a model that can do the task; 0 is chance.

All of them work on any model with a tokenizer (`induction_loss` also without) and respect hooks and edits
that are attached to it: run them inside `with model.hooks(edits=...)`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.analysis.heads import MOST_ROWS, repeated_random_tokens
from hooklens.analysis.reading.connection import read_model
from hooklens.arguments import optional, read_flag, read_int, read_seed, reads, refusal
from hooklens.bundled.corpus import held_out_indirect_objects
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.progress import progress_bar

_SHOWN = 10


class CorpusLoss(NamedTuple):
    """Mean loss on texts.

    Attributes:
        loss: mean cross-entropy in nats per predicted token.
        n_tokens: how many tokens were predicted.
    """

    loss: float
    n_tokens: int


class InductionLoss(NamedTuple):
    """Mean losses in nats on random tokens and on the same tokens again.

    Attributes:
        first: on the first pass; cannot be below `ln` of the number of tokens drawn from, by much.
        second: on the second pass, its first token left out, which nothing foretells.
    """

    first: float
    second: float


class IndirectObjectResult(NamedTuple):
    """How a model does on the indirect-object task.

    Attributes:
        accuracy: share of prompts whose most likely next token, of all, is the answer.
        preference: share of prompts for which the answer is likelier than the repeated name.
        logit_difference: mean logit of the answer minus that of the repeated name.
        n_prompts: number of prompts.
    """

    accuracy: float
    preference: float
    logit_difference: float
    n_prompts: int


@runtime_checkable
class Prompt(Protocol):
    """A prompt with a right and a wrong next word."""

    @property
    def prompt(self) -> str:
        """Text that ends where the answer is due."""
        ...

    @property
    def answer(self) -> str:
        """The word that should come next."""
        ...

    @property
    def wrong(self) -> str:
        """The word to compare it with."""
        ...


_BATCH = partial(read_int, least=1)


def _read_corpus(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[str]:
    """A list of texts; one text would be a list of letters."""
    if isinstance(given, str):
        raise error(f"{what} is the text {given[:40]!r}; expected a list of texts: [text]")
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise refusal(given, what, "a list of texts", error)
    return list(given)


def _read_prompts(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[Prompt]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise refusal(given, what, "a list of prompts with the fields prompt, answer and wrong", error)
    wrong = [place for place, one in enumerate(given) if not _is_prompt(one)]
    if wrong:
        raise error(
            f"{what}: entries {wrong[:_SHOWN]}{' and more' if len(wrong) > _SHOWN else ''} are no prompts; expected "
            "objects with the texts prompt, answer and wrong"
        )
    return list(given)


def _is_prompt(one: object) -> bool:
    texts = (getattr(one, field, None) for field in ("prompt", "answer", "wrong"))
    return all(isinstance(text, str) and text for text in texts)


@reads(model=read_model, texts=_read_corpus, batch_size=_BATCH, prepend_bos=optional(read_flag))
@torch.no_grad()
def corpus_loss(
    model: HookedCausalLM, texts: Sequence[str], *, batch_size: int = 8, prepend_bos: bool | None = None
) -> CorpusLoss:
    """Mean next-token loss on texts, every predicted token counting alike.

    Texts longer than `n_ctx` are cut.

    Args:
        model: a model with a tokenizer.
        texts: at least one of two tokens or more.
        batch_size: texts run at a time; any size gives the same number.
        prepend_bos: None is the model's `default_prepend_bos`.

    Raises:
        InputError: no tokenizer, one text in the place of a list, nothing to predict, or a batch size below 1.
    """
    rows = [model.to_tokens(text, prepend_bos=prepend_bos)[0] for text in texts]
    long_enough = sorted((row for row in rows if len(row) > 1), key=len)
    if not long_enough:
        raise InputError(f"corpus_loss: {len(texts)} texts hold no token to predict; give texts of two tokens or more")
    total, n_tokens = 0.0, 0
    with progress_bar("corpus loss", total=len(long_enough), unit="text", progress=None) as bar:
        for tokens, mask in _pad_batches(long_enough, batch_size):
            losses = model(tokens, return_type="loss", loss_per_token=True, attention_mask=mask)
            total += float(losses.double().sum())
            n_tokens += int(mask[:, 1:].sum())
            bar.update(len(tokens))
    return CorpusLoss(total / n_tokens, n_tokens)


def _pad_batches(rows: Sequence[Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows of token ids, padded on the right, with their masks."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        yield torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True), mask


@reads(
    model=read_model,
    n_rows=partial(read_int, least=1, most=MOST_ROWS),
    # A period of one token leaves nothing to predict.
    period=partial(read_int, least=2),
    seed=read_seed,
)
@torch.no_grad()
def induction_loss(model: HookedCausalLM, *, n_rows: int = 16, period: int = 32, seed: int = 0) -> InductionLoss:
    """The losses on random tokens and on their repetition.

    Args:
        model: the model.
        n_rows: number of sequences.
        period: random tokens in each.
        seed: decides the tokens.

    Raises:
        InputError: the sequences do not fit into `n_ctx`, or a period below 2.
    """
    tokens = repeated_random_tokens(model, n_rows=n_rows, period=period, seed=seed)
    losses = model(tokens, return_type="loss", loss_per_token=True)
    # Entry i is the loss of token i + 1; the last `period - 1` are tokens that have followed their predecessor.
    second = losses[:, -(period - 1) :]
    first = losses[:, :-period]
    return InductionLoss(float(first.mean()), float(second.mean()))


@reads(
    model=read_model,
    items=optional(_read_prompts),
    n_prompts=partial(read_int, least=0, most=MOST_ROWS),
    seed=read_seed,
    batch_size=_BATCH,
)
@torch.no_grad()
def indirect_object_task(
    model: HookedCausalLM,
    items: Sequence[Prompt] | None = None,
    *,
    n_prompts: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> IndirectObjectResult:
    """Accuracy and logit difference on indirect-object prompts, or on any prompts with a right and a wrong word.

    A word of several tokens counts with its first one; where both begin alike the prompt cannot be scored and is
    refused.

    Args:
        model: a model with a tokenizer.
        items: the prompts; None: `n_prompts` generated ones.
        n_prompts: how many to generate.
        seed: decides them.
        batch_size: prompts run at a time.

    Raises:
        InputError: no prompts, no tokenizer, a batch size below 1, or right and wrong words that begin with the
            same token.
    """
    prompts: Sequence[Prompt] = held_out_indirect_objects(n_prompts, seed=seed) if items is None else items
    if not prompts:
        raise InputError("indirect_object_task: there are no prompts")
    encoded = [_encode(model, item) for item in prompts]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].tokens))
    hits, preferred, differences = 0, 0, []
    ordered = [encoded[index] for index in order]
    unscored = iter(ordered)
    with progress_bar("indirect objects", total=len(ordered), unit="prompt", progress=None) as bar:
        for tokens, mask in _pad_batches([prompt.tokens for prompt in ordered], batch_size):
            logits = model(tokens, attention_mask=mask, logits_at=-1)[:, 0].float()
            group = list(islice(unscored, len(tokens)))
            answers, wrongs = ([getattr(prompt, side) for prompt in group] for side in ("answer", "wrong"))
            rows = range(len(group))
            difference = logits[rows, answers] - logits[rows, wrongs]
            hits += sum(int(best) == answer for best, answer in zip(logits.argmax(-1), answers, strict=True))
            preferred += int((difference > 0).sum())
            differences.extend(difference.tolist())
            bar.update(len(tokens))
    n = len(prompts)
    return IndirectObjectResult(hits / n, preferred / n, sum(differences) / n, n)


class _EncodedPrompt(NamedTuple):
    tokens: Int[Tensor, " pos"]
    answer: int
    wrong: int


def _encode(model: HookedCausalLM, item: Prompt) -> _EncodedPrompt:
    tokens = model.to_tokens(item.prompt)[0]
    answer, wrong = (_first_token(model, item, word) for word in (item.answer, item.wrong))
    if answer == wrong:
        raise InputError(
            f"the answers {item.answer!r} and {item.wrong!r} to {item.prompt!r} begin with the same token of this "
            "model's vocabulary; exchange one of them"
        )
    return _EncodedPrompt(tokens, answer, wrong)


def _first_token(model: HookedCausalLM, item: Prompt, word: str) -> int:
    """The token that follows the prompt when a word is written behind it."""
    before = model.to_tokens(item.prompt)[0]
    with_word = model.to_tokens(f"{item.prompt} {word}")[0]
    if len(with_word) <= len(before) or not torch.equal(with_word[: len(before)], before):
        raise InputError(
            f"{word!r} behind {item.prompt!r} changes the prompt's own tokens, so it has no next token; end the prompt "
            "at the end of a word"
        )
    return int(with_word[len(before)])
