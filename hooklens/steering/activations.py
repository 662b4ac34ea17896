"""Activations of prompts at chosen tokens, batch by batch, so that memory does not grow with the number of prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import refusal, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError
from hooklens.evaluation.batching import BatchSize, plan_batches
from hooklens.evaluation.fingerprint import token_fingerprint
from hooklens.evaluation.prefix import Text, encode_continuations, encode_prefix
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.vectors import stop_behind
from hooklens.progress import progress_bar
from hooklens.steering.errors import SteeringError
from hooklens.tokens.inputs import Prompt
from hooklens.tokens.prompts import read_prompts

Positions = Choice | Sequence[Sequence[bool]] | Sequence[Tensor] | str
"""Tokens of prompts: positions (negative ones from a prompt's end; None: all), `"answer"`, or a mask for each prompt.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompts:
    """Prompts, and which of their tokens count.

    Attributes:
        rows: the tokens of each prompt.
        chosen: of each prompt, which tokens count; at least one.
    """

    rows: list[Int[Tensor, " _"]]
    chosen: list[Bool[Tensor, " _"]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(row) for row in self.rows]

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens, and of which ones count."""
        parts = [
            [*row.tolist(), -1, *chosen.nonzero()[:, 0].tolist(), -1]
            for row, chosen in zip(self.rows, self.chosen, strict=True)
        ]
        return token_fingerprint([token for part in parts for token in part])

    def take(self, indices: Sequence[int]) -> "Prompts":
        """Some of the prompts."""
        return Prompts(rows=[self.rows[i] for i in indices], chosen=[self.chosen[i] for i in indices])

    def pad(self, device: torch.device) -> "Padded":
        """The prompts as one batch, padded on the right."""
        width = max(self.lengths)
        ids = torch.zeros(len(self), width, dtype=torch.long)
        mask, chosen = torch.zeros(len(self), width, dtype=torch.bool), torch.zeros(len(self), width, dtype=torch.bool)
        for place, (row, one) in enumerate(zip(self.rows, self.chosen, strict=True)):
            ids[place, : len(row)], mask[place, : len(row)], chosen[place, : len(row)] = row, True, one
        return Padded(ids=ids.to(device), mask=mask.to(device), chosen=chosen.to(device))


@dataclass(frozen=True, eq=False, kw_only=True)
class Padded:
    """A batch of prompts.

    Attributes:
        ids: tokens, padded on the right.
        mask: which columns are tokens.
        chosen: which of them count.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    chosen: Bool[Tensor, "batch pos"]


def encode_prompts(
    model: HookedCausalLM,
    prompts: object,
    *,
    what: str,
    positions: Positions = None,
    questions: Sequence[Text] | None = None,
    prepend_bos: bool | None = None,
) -> Prompts:
    """Prompts as a caller gives them: text, texts, ids, or a list that mixes texts and rows of ids.

    Args:
        model: encodes.
        prompts: the prompts; where there are questions, the answers to them.
        what: the argument, for messages.
        positions: which tokens count.
        questions: what stands before each of the prompts; `positions="answer"` leaves it out.
        prepend_bos: the BOS rule for text.

    Raises:
        SteeringError: no prompts, prompts that do not fit the model, or positions that a prompt does not have.
        InputError: no text and no ids.
    """
    if positions == "answer" and questions is None:
        raise SteeringError(
            "positions='answer' counts the tokens behind a question; give questions=[...], one for each answer"
        )
    if questions is None:
        rows = _read_rows(model, prompts, what=what, prepend_bos=prepend_bos)
        starts = [0] * len(rows)
    else:
        rows, starts = _read_answers(model, prompts, questions, what=what, prepend_bos=prepend_bos)
    n_ctx = model.cfg.n_ctx
    if too_long := [f"{i} ({len(row)} tokens)" for i, row in enumerate(rows) if len(row) > n_ctx]:
        raise SteeringError(f"{what}: prompts {', '.join(too_long[:10])} do not fit the model's n_ctx={n_ctx}")
    chosen = _choose(rows, starts, positions, what=what)
    return Prompts(rows=rows, chosen=chosen)


def _read_rows(
    model: HookedCausalLM, prompts: object, *, what: str, prepend_bos: bool | None
) -> list[Int[Tensor, " _"]]:
    if isinstance(prompts, str | Tensor):
        found = read_prompts(
            prompts, model.tokenizer, d_vocab=model.cfg.d_vocab, n_ctx=model.cfg.n_ctx,
            prepend_bos=model.bos_rule(prepend_bos=prepend_bos),
        )  # fmt: skip
        return [row.cpu() for row in found]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes) or not prompts:
        raise refusal(prompts, what, "a list of at least one prompt (texts or rows of token ids)", SteeringError)
    if all(isinstance(one, int) for one in prompts):
        prompts = [prompts]
    rows: list[Int[Tensor, " _"]] = []
    for place, one in enumerate(prompts):
        read: Prompt = one
        try:
            found = read_prompts(
                read, model.tokenizer, d_vocab=model.cfg.d_vocab, n_ctx=model.cfg.n_ctx,
                prepend_bos=model.bos_rule(prepend_bos=prepend_bos),
            )  # fmt: skip
        except HookLensError as error:
            raise SteeringError(f"{what}: prompt {place}: {error}") from error
        if len(found) != 1:
            raise SteeringError(f"{what}: prompt {place} is {show(one)}, expected one text or one row of token ids")
        rows.append(found[0].cpu())
    return rows


def _read_answers(
    model: HookedCausalLM, answers: object, questions: Sequence[Text], *, what: str, prepend_bos: bool | None
) -> tuple[list[Int[Tensor, " _"]], list[int]]:
    """Each question with its answer behind it, and where the answer begins."""
    for given, name in ((answers, what), (questions, "questions")):
        if isinstance(given, str | Tensor) or not isinstance(given, Sequence) or not given:
            raise refusal(given, name, "a list of texts or rows of token ids", SteeringError)
    assert isinstance(answers, Sequence)
    if len(answers) != len(questions):
        raise SteeringError(f"{what} has {len(answers)} answers to {len(questions)} questions; give one to each")
    rows, starts = [], []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            prefix, [tail] = encode_continuations(
                model, encode_prefix(model, question, prepend_bos=prepend_bos), [answer], what=None
            )
        except HookLensError as error:
            raise SteeringError(f"{what}: answer {place}: {error}") from error
        rows.append(torch.cat([prefix.tokens[0].cpu(), torch.tensor(tail, dtype=torch.long)]))
        starts.append(len(prefix))
    return rows, starts


def _choose(
    rows: list[Int[Tensor, " _"]], starts: list[int], positions: Positions, *, what: str
) -> list[Bool[Tensor, " _"]]:
    if isinstance(positions, str):
        if positions != "answer":
            raise refusal(positions, "positions", "positions, 'answer', or a mask for each prompt", SteeringError)
        return [torch.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
    if is_masks(positions):
        assert isinstance(positions, Sequence)
        return _read_masks(rows, positions, what=what)
    index = read_choice(positions, what="positions", error=SteeringError)
    chosen = []
    for place, row in enumerate(rows):
        subject = f"{what}: prompt {place}: positions"
        columns = resolve_choice(index, len(row), what=subject, noun="tokens", error=SteeringError)
        if not columns:
            raise SteeringError(f"{subject}={show(positions)} chooses none of its {len(row)} tokens")
        mask = torch.zeros(len(row), dtype=torch.bool)
        mask[columns] = True
        chosen.append(mask)
    return chosen


def is_masks(positions: object) -> bool:
    """Whether these are masks, one for each prompt; a number may be a tensor without axes."""
    if isinstance(positions, list | tuple):
        return any(isinstance(one, list | tuple) or (isinstance(one, Tensor) and one.ndim) for one in positions)
    return isinstance(positions, Tensor) and positions.ndim == 2


def _read_masks(rows: list[Int[Tensor, " _"]], masks: object, *, what: str) -> list[Bool[Tensor, " _"]]:
    assert isinstance(masks, Sequence | Tensor)
    if len(masks) != len(rows):
        raise SteeringError(
            f"positions has {len(masks)} masks for the {len(rows)} prompts of {what}; give one for each"
        )
    read = []
    for place, (row, given) in enumerate(zip(rows, masks, strict=True)):
        mask = given if isinstance(given, Tensor) else torch.tensor(given)
        if mask.dtype != torch.bool or mask.shape != row.shape or not bool(mask.any()):
            raise SteeringError(
                f"positions: mask {place} is {show(mask)}, expected [{len(row)}] booleans, a token of {what}'s prompt "
                "each, at least one of them True"
            )
        read.append(mask.cpu())
    return read


def run_batches(
    model: HookedCausalLM,
    prompts: Prompts,
    names: Sequence[str],
    *,
    batch_size: BatchSize,
    progress: bool,
    edits: Sequence[Edit] = (),
    what: str = "activations",
) -> Iterator[tuple[list[int], Padded, dict[str, Float[Tensor, "batch pos ..."]]]]:
    """The activations of all prompts; blocks above the last point do not run.

    Yields:
        Which prompts, the batch, and its activations by name.
    """
    stop = stop_behind(names)
    with progress_bar(what, total=len(prompts), unit="prompt", progress=progress) as bar:
        for indices in plan_batches(model, prompts.lengths, n_prefix=0, batch_size=batch_size):
            batch = prompts.take(indices).pad(model.device)
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    batch.ids,
                    attention_mask=batch.mask,
                    names_filter=list(names),
                    edits=edits,
                    return_type=None,
                    stop_at_layer=stop,
                )
            yield indices, batch, {name: cache[name] for name in names}
            bar.update(len(indices))


def average_chosen(
    activations: Float[Tensor, "batch pos ..."], chosen: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch groups d"]:
    """The mean over the tokens that count of each prompt, in float64; `groups` are heads, or one."""
    grouped = activations.reshape(*activations.shape[:2], -1, activations.shape[-1])
    weights = chosen.to(grouped.device)
    # Of one token, the mean is that token, bit for bit.
    summed = grouped.double().masked_fill(~weights[..., None, None], 0.0).sum(1)
    return summed / weights.sum(1).double()[:, None, None]
