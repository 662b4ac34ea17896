"""What the bundled checkpoints know, in numbers, and the bars that each of them must reach.

Everything is measured through a callable from token ids to logits, so the same functions measure a
`transformers` model and a HookLens model.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.bundled.corpus import PromptItem, all_facts, held_out_indirect_objects, sample_repeats
from hooklens.bundled.words import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LogitsFunction = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos d_vocab"]]
PatternsFunction = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "n_layers batch head query key"]]

REPEAT_PERIOD = 32


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The measured skills of a checkpoint.

    Attributes:
        indirect_object_accuracy: share of held-out prompts whose most likely next word, of all words, is
            the answer.
        indirect_object_logit_difference: mean logit of the answer minus that of the subject.
        first_half_loss: mean loss in nats on random words.
        second_half_loss: mean loss in nats on the same words again, the first of them included, which
            nothing foretells.
        facts_accuracy: share of facts, over all phrasings, whose most likely next word is the answer.
    """

    indirect_object_accuracy: float
    indirect_object_logit_difference: float
    first_half_loss: float
    second_half_loss: float
    facts_accuracy: float

    def list_shortfalls(self) -> list[str]:
        """The bars that are not reached, one phrase each; empty for a checkpoint fit to be bundled."""
        bars = [
            ("indirect-object accuracy", self.indirect_object_accuracy, ">=", 0.99),
            ("indirect-object logit difference", self.indirect_object_logit_difference, ">=", 4.0),
            ("loss on random words", self.first_half_loss, ">=", 4.0),
            ("loss on repeated words", self.second_half_loss, "<=", 0.6),
            ("facts accuracy", self.facts_accuracy, ">=", 1.0),
        ]
        return [
            f"{what} is {value:.4f}, expected {relation} {bar}"
            for what, value, relation, bar in bars
            if not (value >= bar if relation == ">=" else value <= bar)
        ]

    def to_dict(self) -> dict[str, float]:
        """Field name to value, for JSON."""
        return dataclasses.asdict(self)


def measure(
    logits_of: LogitsFunction,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    n_indirect_objects: int = 1000,
    n_repeats: int = 64,
    seed: int = 0,
) -> Metrics:
    """Measure a model on held-out indirect objects, repeated random sequences and all facts.

    Args:
        logits_of: token ids to logits.
        tokenizer: the checkpoint's; it puts the BOS in front itself.
        n_indirect_objects: number of prompts, of held-out names in held-out templates.
        n_repeats: number of repeated sequences, of period `REPEAT_PERIOD`.
        seed: decides prompts and sequences.
    """
    accuracy, difference = measure_prompts(
        logits_of, tokenizer, held_out_indirect_objects(n_indirect_objects, seed=seed)
    )
    facts_accuracy, _ = measure_prompts(logits_of, tokenizer, all_facts())
    repeats = build_repeats(tokenizer, n=n_repeats, period=REPEAT_PERIOD, seed=seed)
    first_half, second_half = measure_repeats(logits_of, repeats)
    return Metrics(
        indirect_object_accuracy=accuracy,
        indirect_object_logit_difference=difference,
        first_half_loss=first_half,
        second_half_loss=second_half,
        facts_accuracy=facts_accuracy,
    )


@torch.no_grad()
def measure_prompts(
    logits_of: LogitsFunction, tokenizer: "PreTrainedTokenizerBase", items: Sequence[PromptItem]
) -> tuple[float, float]:
    """The share of prompts continued by their answer, and the mean logit of answer minus wrong word."""
    correct = 0
    differences: list[Tensor] = []
    for group, tokens in _group_by_length(tokenizer, items):
        last = logits_of(tokens)[:, -1].float()
        answers = torch.tensor(tokenizer.convert_tokens_to_ids([item.answer for item in group]))
        wrongs = torch.tensor(tokenizer.convert_tokens_to_ids([item.wrong for item in group]))
        correct += int((last.argmax(dim=-1) == answers).sum())
        rows = torch.arange(len(group))
        differences.append(last[rows, answers] - last[rows, wrongs])
    return correct / len(items), float(torch.cat(differences).mean())


def _group_by_length(
    tokenizer: "PreTrainedTokenizerBase", items: Sequence[PromptItem]
) -> Iterator[tuple[list[PromptItem], Int[Tensor, "batch pos"]]]:
    """Batches of prompts with equally many tokens, so that no padding takes part."""
    encoded = [tokenizer(item.prompt)["input_ids"] for item in items]
    for length in sorted({len(ids) for ids in encoded}):
        rows = [row for row, ids in enumerate(encoded) if len(ids) == length]
        yield [items[row] for row in rows], torch.tensor([encoded[row] for row in rows])


def build_repeats(tokenizer: "PreTrainedTokenizerBase", *, n: int, period: int, seed: int) -> Int[Tensor, "batch pos"]:
    """`n` rows of BOS, `period` random words and the same words again: `1 + 2 * period` tokens."""
    rng = random.Random(seed)
    rows = [[END_OF_TEXT, *sample_repeats(rng, period=period, length=2 * period)] for _ in range(n)]
    return torch.tensor([tokenizer.convert_tokens_to_ids(row) for row in rows])


@torch.no_grad()
def measure_repeats(logits_of: LogitsFunction, repeats: Int[Tensor, "batch pos"]) -> tuple[float, float]:
    """The mean losses in nats on the first and on the second pass over the random words."""
    logits = logits_of(repeats)[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), repeats[:, 1:].flatten(), reduction="none")
    first_half, second_half = losses.reshape(repeats[:, 1:].shape).chunk(2, dim=1)
    return float(first_half.mean()), float(second_half.mean())


@torch.no_grad()
def measure_heads(
    patterns_of: PatternsFunction, tokenizer: "PreTrainedTokenizerBase", *, n_repeats: int = 16, seed: int = 0
) -> tuple[Float[Tensor, "n_layers head"], Float[Tensor, "n_layers head"]]:
    """Each head's induction score and previous-token score on repeated random sequences.

    The previous-token score is the mean attention to the position before. The induction score is the mean
    attention from the second pass to the position after the same word's first occurrence, `period - 1`
    back (Olsson et al. 2022).
    """
    repeats = build_repeats(tokenizer, n=n_repeats, period=REPEAT_PERIOD, seed=seed)
    patterns = patterns_of(repeats)
    previous = patterns.diagonal(offset=-1, dim1=-2, dim2=-1)
    # The diagonal starts at query period - 1; the second pass at query period + 1, behind BOS and first pass.
    matches = patterns.diagonal(offset=1 - REPEAT_PERIOD, dim1=-2, dim2=-1)[..., 2:]
    return matches.mean(dim=(1, 3)), previous.mean(dim=(1, 3))
