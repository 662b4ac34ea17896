"""Multiple choice: each choice is scored as a continuation of the question, the most likely one is the answer.

"Most likely" has several readings, and papers differ in which they report. Three are those of lm-evaluation-harness
0.4.13 (`lm_eval/api/task.py`; Gao et al., "The Language Model Evaluation Harness"), under its names:

- `acc`: by log-probability;
- `acc_norm`: by log-probability per character (Unicode code point) of the choice;
- `acc_bytes`: by log-probability per byte of the choice in UTF-8.

Lengths there are those of the choice without the delimiter that stands between question and choice, a space by
default. The harness puts it there; here it is part of the choice (`" Mary"`), and is not counted where a choice begins
with it. Of equal choices the first is picked, there as here. Two readings are HookLens's own:

- `logprob_per_token`: by log-probability per token;
- `logprob_per_byte`: by log-probability per byte of all that is scored, the delimiter included.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooklens.arguments import reads, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.continuations import describe_score
from hooklens.evaluation.encoded import EncodedItem, encode_items
from hooklens.evaluation.items import ItemFile, MultipleChoiceItem, parse_item, read_items
from hooklens.evaluation.prefix import Prefix, Text, make_prefix, run_behind
from hooklens.evaluation.scoring import RowScore, score_rows
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    import pandas

READINGS = {
    "": "acc",
    "_norm": "acc_norm",
    "_bytes": "acc_bytes",
    "_per_token": "logprob_per_token",
    "_per_byte": "logprob_per_byte",
}
"""Each reading of "most likely": the suffix of its columns, and its name among accuracies."""

_SHOWN = 10


@reads()
def multiple_choice(
    model: HookedCausalLM,
    items: Iterable[MultipleChoiceItem | Mapping[str, Any]] | str | Path,
    *,
    prefix: Text | None = None,
    target_delimiter: str = " ",
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
        prefix: what stands before every question (instructions, solved examples); it runs once. Questions are
            encoded together with it, and choices together with their question.
        target_delimiter: what choices that are text begin with and `acc_norm` and `acc_bytes` do not count, as in the
            harness's task files; `""` counts all.
        batch_size: choices at once.
        edits: values from `hooklens.edits`, as in `score_continuations`.
        prepend_bos: for the text a sequence begins with; None is the model's `default_prepend_bos`.
        progress: show a progress bar.

    Returns:
        A row per item: `id`, `n_choices`, `answer`; then, for each reading of "most likely" (`acc` without a suffix,
        `acc_norm` as `_norm`, `acc_bytes` as `_bytes`, and `_per_token`, `_per_byte`), three columns. `logprobs...`: a
        list over choices, in nats, as the reading divides them (negative infinity for a choice that is nothing but the
        delimiter, None for token ids that have no text). `predicted...`: the index of the best choice, the first of
        equals; None where one is NaN. `correct...`: whether that is the answer; None where the answer is not known,
        or a choice has no text to count. `attrs["accuracy"]` has the share of correct answers by the readings' names,
        over items that are judged; `attrs["errors"]` the faulty lines of a file, as text.

    Raises:
        InputError: no item, items that are none (all are named), or that do not fit the context.
    """
    check_batch_size(batch_size)
    refuse_other_outputs(model.cfg, "multiple_choice", InputError)
    check_target_delimiter(target_delimiter)
    given = _collect_items(items)
    shared = None if prefix is None else make_prefix(model, prefix, edits=edits, prepend_bos=prepend_bos)
    encoded, faults = encode_items(model, given.items, shared, edits=edits, prepend_bos=prepend_bos)
    errors = given.list_errors(faults)
    records = []
    with progress_bar("answering", encoded.values(), unit="item", progress=progress) as bar:
        for one in bar:
            records.append(answer_item(model, one, shared, target_delimiter=target_delimiter, batch_size=batch_size))
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    table.attrs["accuracy"] = measure_accuracy(records)
    table.attrs["errors"] = errors
    return table


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What was given to be answered.

    Attributes:
        items: by line of the file, or place in the list.
        faults: what is wrong with the others.
        file: where they come from; None: from the caller, who is told of faults before anything runs.
    """

    items: dict[int, MultipleChoiceItem]
    faults: dict[int, str]
    file: ItemFile | None = None

    def list_errors(self, more: Mapping[int, str]) -> list[str]:
        """All faults, in words and in order.

        Raises:
            InputError: nothing is left to answer, or a caller's own item is at fault.
        """
        faults = sorted({**self.faults, **more}.items())
        if self.file is not None:
            errors = [str(self.file.fault(line, message)) for line, message in faults]
            nothing = f"{self.file.path} holds no multiple-choice item that can be answered"
        else:
            errors = [f"item {index}: {message}" for index, message in faults]
            nothing = "there is no item to answer; give at least one"
        is_empty = len(more) == len(self.items)
        if is_empty or (errors and self.file is None):
            left_out = [f"and {len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else []
            head = [nothing] if self.file is not None or not errors else []
            raise InputError("\n".join([*head, *errors[:_SHOWN], *left_out]))
        return errors


_NO_QUESTION = "is a continuation; expected 'question' and 'choices'"


def _collect_items(items: Iterable[MultipleChoiceItem | Mapping[str, Any]] | str | Path) -> _Given:
    if isinstance(items, str | Path):
        file = read_items(items)
        faults = {error.line: error.message for error in file.errors}
        found = {line: item for line, item in file.items.items() if isinstance(item, MultipleChoiceItem)}
        faults |= dict.fromkeys(file.items.keys() - found.keys(), _NO_QUESTION)
        return _Given(items=found, faults=faults, file=file)
    found, faults = {}, {}
    for index, item in enumerate(items):
        try:
            parsed = parse_item(item, default_id=str(index)) if isinstance(item, Mapping) else item
        except InputError as error:
            faults[index] = str(error)
            continue
        if isinstance(parsed, MultipleChoiceItem):
            found[index] = parsed
        else:
            faults[index] = _NO_QUESTION
    return _Given(items=found, faults=faults)


def check_target_delimiter(given: object) -> None:
    """Check what a caller gave.

    Raises:
        InputError: it is no text.
    """
    require(given, kind=str, what="target_delimiter", expected="a text, as ' '")


def answer_item(
    model: HookedCausalLM,
    encoded: EncodedItem,
    prefix: Prefix | None,
    *,
    target_delimiter: str = " ",
    batch_size: BatchSize = "auto",
) -> dict[str, Any]:
    """A record of a multiple-choice item's scores and predictions.

    Args:
        model: answers.
        encoded: what is asked.
        prefix: what stands before all items, run.
        target_delimiter: see `multiple_choice`.
        batch_size: choices at once.

    Raises:
        InputError: a choice does not fit the context.
    """
    item, rows = encoded.item, encoded.rows
    assert isinstance(item, MultipleChoiceItem)
    assert encoded.start is not None
    question = run_behind(model, prefix, encoded.start)
    scores: dict[int, RowScore] = {}
    for batch in score_rows(model, question, rows, batch_size=batch_size):
        scores.update(batch)
    described = [describe_score(model, choice, rows[i], scores[i]) for i, choice in enumerate(item.choices)]
    judged = judge_choices(described, item.answer, target_delimiter)
    return {"id": item.id, "n_choices": len(rows), "answer": item.answer, **judged}


def judge_choices(
    described: Sequence[Mapping[str, Any]], answer: int | None, target_delimiter: str = " "
) -> dict[str, Any]:
    """The columns `logprobs...`, `predicted...` and `correct...` of an item, see `multiple_choice`.

    Args:
        described: a score per choice, see `describe_score`.
        answer: the index of the right choice, None if that is not known.
        target_delimiter: see `multiple_choice`.
    """
    read = [read_choice(one, target_delimiter) for one in described]
    record: dict[str, Any] = {}
    for suffix in READINGS:
        record[f"logprobs{suffix}"] = [choice[suffix] for choice in read]
    for suffix in READINGS:
        record[f"predicted{suffix}"] = _find_largest(record[f"logprobs{suffix}"])
    for suffix in READINGS:
        # Scores that are no numbers pick no choice, which is wrong; what cannot be counted is not judged.
        is_judged = answer is not None and all(choice[suffix] is not None for choice in read)
        record[f"correct{suffix}"] = record[f"predicted{suffix}"] == answer if is_judged else None
    return record


def read_choice(described: Mapping[str, Any], target_delimiter: str) -> dict[str, float | None]:
    """What each reading compares, by its suffix, in nats; None where the choice has no text to count.

    Args:
        described: the choice's score, see `describe_score`.
        target_delimiter: see `multiple_choice`.
    """
    total, text = described["logprob"], described["continuation"]
    read = {"": total, "_norm": None, "_bytes": None, "_per_token": described["logprob_per_token"], "_per_byte": None}
    if text is not None:
        counted = text.removeprefix(target_delimiter)
        read["_norm"] = _divide(total, len(counted))
        read["_bytes"] = _divide(total, len(counted.encode()))
        read["_per_byte"] = _divide(total, len(text.encode()))
    return read


def _divide(total: float, length: int) -> float:
    """A log-probability per unit of length; that of nothing is as in numpy, which the harness divides with."""
    return total / length if length else total * math.inf


def _find_largest(values: Sequence[float | None]) -> int | None:
    """The index of the first largest number; None where one is not known or NaN."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return values.index(max(known)) if known and len(known) == len(values) else None


def measure_accuracy(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of correct answers by reading (`acc`, `acc_norm`, ...), over records that are judged."""
    records = list(records)
    judged = {
        name: [record[f"correct{suffix}"] for record in records if record[f"correct{suffix}"] is not None]
        for suffix, name in READINGS.items()
    }
    return {name: sum(correct) / len(correct) for name, correct in judged.items() if correct}
