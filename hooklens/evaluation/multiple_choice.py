"""Multiple choice: each choice is scored as a continuation of the question, the most likely one is the answer.

"Most likely" has three readings, and papers differ in which they report: by log-probability; by log-probability
per token; per byte of text, which does not depend on the tokenizer (Gao et al. 2021, "A framework for few-shot
language model evaluation", names the last `acc_norm`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.continuations import describe_score, encode_all
from hooklens.evaluation.items import MultipleChoiceItem, parse_item, read_items
from hooklens.evaluation.prefix import Prefix, Text, extend_prefix, make_prefix
from hooklens.evaluation.scoring import RowScore, score_rows
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

# Column suffix of each reading, and the value of a choice that it compares.
READINGS = {"": "logprob", "_per_token": "logprob_per_token", "_per_byte": "logprob_per_byte"}

_SHOWN = 10


def multiple_choice(
    model: HookedCausalLM,
    items: Iterable[MultipleChoiceItem | Mapping[str, Any]] | str | Path,
    *,
    prefix: Text | None = None,
    batch_size: BatchSize = "auto",
    edits: Sequence[Edit] = (),
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> "pandas.DataFrame":
    """Answer multiple-choice items.

    Args:
        model: answers.
        items: `MultipleChoiceItem`s, mappings with `question`, `choices` and perhaps `answer` and `id`, or the
            path of a JSON Lines file of such.
        prefix: what stands before every question (instructions, solved examples); it runs once. Questions behind
            it, like choices, are encoded alone and without BOS.
        batch_size: choices at once.
        edits: values from `hooklens.edits`, as in `score_continuations`.
        prepend_bos: for the text a sequence begins with; None is the tokenizer's own rule.
        progress: show a progress bar.

    Returns:
        A row per item: `id`, `n_choices`, `answer`; `logprobs`, `logprobs_per_token`, `logprobs_per_byte`, lists
        over choices, in nats; `predicted`, `predicted_per_token`, `predicted_per_byte`, the index of the best
        choice (the first of equals; None without bytes); `correct...`, whether that is the answer (None where the
        answer is not known). `attrs["accuracy"]` has the share of correct answers by reading, over items with an
        answer; `attrs["errors"]` the faulty lines of a file, as text.

    Raises:
        InputError: no item, items that are none (all are named), or that do not fit the context.
    """
    check_batch_size(batch_size)
    read, errors = _collect_items(items)
    shared = None if prefix is None else make_prefix(model, prefix, edits=edits, prepend_bos=prepend_bos)
    records = []
    bar = import_package("tqdm.auto").tqdm(read, desc="answering", unit="item", disable=not progress, leave=False)
    for item in bar:
        ready = _make_question(model, item, shared, edits=edits, prepend_bos=prepend_bos)
        records.append(answer_item(model, item, ready, batch_size=batch_size))
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    table.attrs["accuracy"] = measure_accuracy(records)
    table.attrs["errors"] = errors
    return table


def _collect_items(
    items: Iterable[MultipleChoiceItem | Mapping[str, Any]] | str | Path,
) -> tuple[list[MultipleChoiceItem], list[str]]:
    if isinstance(items, str | Path):
        file = read_items(items)
        others = [
            file.fault(line, "is a continuation; expected 'question' and 'choices'")
            for line, item in file.items.items()
            if not isinstance(item, MultipleChoiceItem)
        ]
        read = [item for item in file.items.values() if isinstance(item, MultipleChoiceItem)]
        errors = [str(error) for error in sorted([*file.errors, *others], key=lambda error: error.line)]
        if not read:
            raise InputError("\n".join([f"{file.path} holds no multiple-choice item", *errors[:_SHOWN]]))
        return read, errors
    read, wrong = [], []
    for index, item in enumerate(items):
        try:
            parsed = parse_item(item, default_id=str(index)) if isinstance(item, Mapping) else item
            if not isinstance(parsed, MultipleChoiceItem):
                raise InputError("is a continuation; expected 'question' and 'choices'")
            read.append(parsed)
        except InputError as error:
            wrong.append(f"item {index}: {error}")
    if wrong or not read:
        raise InputError("\n".join(wrong[:_SHOWN]) or "there is no item to answer; give at least one")
    return read, []


def _make_question(
    model: HookedCausalLM,
    item: MultipleChoiceItem,
    shared: Prefix | None,
    *,
    edits: Sequence[Edit],
    prepend_bos: bool | None,
) -> Prefix:
    if shared is not None:
        return extend_prefix(model, shared, item.question)
    return make_prefix(model, item.question, edits=edits, prepend_bos=prepend_bos)


def answer_item(
    model: HookedCausalLM, item: MultipleChoiceItem, question: Prefix, *, batch_size: BatchSize = "auto"
) -> dict[str, Any]:
    """A record of an item's scores and predictions.

    Args:
        model: answers.
        item: what is asked.
        question: the item's question, run.
        batch_size: choices at once.

    Raises:
        InputError: a choice has no token or does not fit the context.
    """
    rows = encode_all(model, item.choices)
    scores: dict[int, RowScore] = {}
    for batch in score_rows(model, question, rows, batch_size=batch_size):
        scores.update(batch)
    described = [describe_score(model, choice, rows[i], scores[i]) for i, choice in enumerate(item.choices)]
    record: dict[str, Any] = {"id": item.id, "n_choices": len(rows), "answer": item.answer}
    for suffix, value in READINGS.items():
        record[f"logprobs{suffix}"] = [choice[value] for choice in described]
    for suffix in READINGS:
        record[f"predicted{suffix}"] = _find_largest(record[f"logprobs{suffix}"])
    for suffix in READINGS:
        predicted = record[f"predicted{suffix}"]
        known = item.answer is not None and predicted is not None
        record[f"correct{suffix}"] = predicted == item.answer if known else None
    return record


def _find_largest(values: Sequence[float]) -> int | None:
    """The index of the first largest number; None where one is NaN."""
    if any(value != value for value in values):  # noqa: PLR0124  (NaN alone differs from itself)
        return None
    return max(range(len(values)), key=lambda index: values[index])


def measure_accuracy(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of correct answers by reading (`logprob`, ...), over records whose answer is known."""
    judged = {
        value: [record[f"correct{suffix}"] for record in records if record[f"correct{suffix}"] is not None]
        for suffix, value in READINGS.items()
    }
    return {value: sum(correct) / len(correct) for value, correct in judged.items() if correct}
