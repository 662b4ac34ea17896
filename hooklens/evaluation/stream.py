"""Score a file of items into a file of results, item by item; an interrupted run goes on where it was."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.continuations import describe_score
from hooklens.evaluation.fingerprint import model_fingerprint, token_fingerprint
from hooklens.evaluation.items import ContinuationItem, Item, ItemError, ItemFile, MultipleChoiceItem, read_items
from hooklens.evaluation.multiple_choice import answer_item
from hooklens.evaluation.prefix import Prefix, Text, encode_continuation, extend_prefix, make_prefix
from hooklens.evaluation.results_file import ResultsFile
from hooklens.evaluation.scoring import check_context, score_rows
from hooklens.optional import import_package


@dataclass(frozen=True, kw_only=True)
class StreamSummary:
    """What a run did.

    Attributes:
        n_scored: items scored in this run.
        n_found: items whose results were there already.
        errors: lines that could not be scored.
    """

    n_scored: int
    n_found: int
    errors: list[ItemError]


def score_file(
    model: HookedCausalLM,
    items: str | Path,
    results: str | Path,
    *,
    prefix: Text,
    batch_size: BatchSize = "auto",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> StreamSummary:
    """Score the items of a JSON Lines file behind one prefix, appending each result as a line of JSON.

    Results have the columns of `score_continuations` or `multiple_choice`, with `id` (match items by it: results
    come in another order) and `item`, a hash of the item. Results that the file holds already are kept and not
    computed again, so a run that was interrupted is finished by running it again.

    Args:
        model: scores.
        items: the file, see `hooklens.evaluation.items`.
        results: the file to append to.
        prefix: what stands before every continuation and question.
        batch_size: rows at once.
        prepend_bos: for a prefix that is text.
        progress: show a progress bar.

    Raises:
        InputError: a file cannot be used, or the results belong to another model or prefix. Lines that cannot be
            scored do not raise; the summary lists them.
    """
    check_batch_size(batch_size)
    file = read_items(items)
    ready = make_prefix(model, prefix, prepend_bos=prepend_bos)
    run = {"model": model_fingerprint(model), "prefix": token_fingerprint(ready.tokens[0].tolist())}
    with ResultsFile(results, run) as out:
        pending, errors = _leave_out_done(file, out.done)
        n_found = len(file.items) - len(pending) - len(errors)
        n_scored = 0
        faults: dict[int, str] = {}
        bar = import_package("tqdm.auto").tqdm(
            total=len(pending), desc="scoring", unit="item", disable=not progress, leave=False
        )
        with bar:
            for records in _score_pending(model, ready, pending, batch_size, faults.__setitem__):
                out.append(records)
                n_scored += len(records)
                bar.update(len(records))
    errors += [file.fault(line, message) for line, message in faults.items()]
    return StreamSummary(
        n_scored=n_scored,
        n_found=n_found,
        errors=sorted([*file.errors, *errors], key=lambda error: error.line),
    )


def item_fingerprint(item: Item) -> str:
    """A hash of an item's content, which tells an item apart from another one under its id."""
    content = json.dumps(dataclasses.asdict(item), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _leave_out_done(file: ItemFile, done: Mapping[str, str]) -> tuple[dict[int, Item], list[ItemError]]:
    """Items that have no result, by line, and those whose id has the result of another item."""
    pending: dict[int, Item] = {}
    errors = []
    for line, item in file.items.items():
        if item.id not in done:
            pending[line] = item
        elif done[item.id] != item_fingerprint(item):
            message = (
                f"the results hold another item under the id {item.id!r}; give items ids of their own, or start "
                "with a new results file"
            )
            errors.append(file.fault(line, message))
    return pending, errors


def _score_pending(
    model: HookedCausalLM,
    prefix: Prefix,
    pending: Mapping[int, Item],
    batch_size: BatchSize,
    report_fault: Callable[[int, str], None],
) -> Iterator[list[dict[str, Any]]]:
    """Records of items as they are scored: continuations batch by batch, then questions one by one."""
    encoded: list[tuple[ContinuationItem, list[int]]] = []
    for line, item in pending.items():
        if isinstance(item, ContinuationItem):
            try:
                tokens = encode_continuation(model, item.continuation)
                check_context(model, len(prefix), [len(tokens)])
                encoded.append((item, tokens))
            except InputError as error:
                report_fault(line, str(error))
    for batch in score_rows(model, prefix, [tokens for _, tokens in encoded], batch_size=batch_size):
        scored = [(*encoded[index], score) for index, score in batch.items()]
        yield [
            {**_identify(item), **describe_score(model, item.continuation, tokens, score)}
            for item, tokens, score in scored
        ]
    for line, item in pending.items():
        if isinstance(item, MultipleChoiceItem):
            try:
                question = extend_prefix(model, prefix, item.question)
                record = answer_item(model, item, question, batch_size=batch_size)
            except InputError as error:
                report_fault(line, str(error))
                continue
            yield [{**record, **_identify(item)}]


def _identify(item: Item) -> dict[str, Any]:
    return {"id": item.id, "item": item_fingerprint(item)}
