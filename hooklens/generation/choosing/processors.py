"""What happens to the logits before a token is chosen: penalties, the caller's own processors, warpers.

The order is transformers': repetition penalty, frequency penalty, the caller's processors, then temperature,
top-k, top-p, min-p. All but the frequency penalty are transformers' own classes.

Processors that read ids are shown each row without padding: in a batch of ragged prompts they run once for
each length of row. So a row comes out the same alone and in any batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.generation.options import GenerationOptions, LogitsFunction
from hooklens.optional import import_package

Scores = Float[Tensor, "batch d_vocab"]
Ids = Int[Tensor, "batch pos"]

# What processors that look at scores alone are given for ids.
_NO_IDS = torch.empty(0, 0, dtype=torch.long)


class FrequencyPenalty:
    """Takes `penalty * count` off the logit of every token, `count` being how often its row holds it.

    The formula is that of the OpenAI API (`frequency_penalty`); as in TransformerLens the prompt counts, too.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        """The penalised scores."""
        counts = torch.zeros_like(scores).scatter_add(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.penalty * counts


@dataclass(frozen=True, kw_only=True)
class LogitsPipeline:
    """The processors of one generation.

    Attributes:
        reading_ids: may look at a row's tokens, so they must not see padding.
        reading_scores: look at the scores alone.
    """

    reading_ids: tuple[LogitsFunction, ...]
    reading_scores: tuple[LogitsFunction, ...]

    def __call__(self, scores: Scores, ids: "RowIds") -> Scores:
        """The processed scores, -inf for tokens that are ruled out."""
        if self.reading_ids:
            scores = self._process_rows(scores, ids)
        return self.warp(scores)

    def warp(self, scores: Scores) -> Scores:
        """The scores after the processors that look at nothing else."""
        for process in self.reading_scores:
            scores = process(_NO_IDS, scores)
        return scores

    def _process_rows(self, scores: Scores, ids: "RowIds") -> Scores:
        processed = torch.empty_like(scores)
        for rows, group_ids in ids.groups():
            group = scores if rows is None else scores[rows]
            for process in self.reading_ids:
                group = process(group_ids, group)
            if rows is None:
                return group
            processed[rows] = group
        return processed


@dataclass(frozen=True, kw_only=True)
class RowIds:
    """The tokens of the rows being generated.

    Attributes:
        padded: `[batch pos]`, padding on the left.
        padding: columns of padding of each row; None: no row has any.
    """

    padded: Tensor
    padding: list[int] | None

    def groups(self) -> list[tuple[Tensor | None, Ids]]:
        """The rows by length: which rows (None: all) and their ids without padding."""
        if self.padding is None:
            return [(None, self.padded)]
        groups: list[tuple[Tensor | None, Tensor]] = []
        for width in sorted(set(self.padding)):
            rows = torch.tensor([row for row, own in enumerate(self.padding) if own == width])
            rows = rows.to(self.padded.device)
            groups.append((rows, self.padded[rows, width:]))
        return groups


def build_pipeline(options: GenerationOptions) -> LogitsPipeline:
    """The processors that the options ask for."""
    library = None
    reading_ids: list[LogitsFunction] = []
    if options.repetition_penalty is not None and options.repetition_penalty != 1:
        library = import_package("transformers.generation.logits_process")
        reading_ids.append(library.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.freq_penalty:
        reading_ids.append(FrequencyPenalty(options.freq_penalty))
    reading_ids.extend(options.logits_processor)

    warpers: list[tuple[str, int | float]] = []
    if options.samples:
        if options.temperature != 1:
            warpers.append(("TemperatureLogitsWarper", float(options.temperature)))
        if options.top_k is not None:
            warpers.append(("TopKLogitsWarper", options.top_k))
        if options.top_p is not None and options.top_p < 1:
            warpers.append(("TopPLogitsWarper", float(options.top_p)))
        if options.min_p:
            warpers.append(("MinPLogitsWarper", float(options.min_p)))
    if warpers:
        library = import_package("transformers.generation.logits_process")
    return LogitsPipeline(
        reading_ids=tuple(reading_ids),
        reading_scores=tuple(getattr(library, name)(value) for name, value in warpers),
    )
