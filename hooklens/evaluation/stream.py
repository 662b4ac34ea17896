"""Score a file of items into a file of results, item by item; an interrupted run goes on where it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hooklens.arguments import optional, read_flag, read_function, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.continuations import describe_score
from hooklens.evaluation.encoded import EncodedItem, encode_items
from hooklens.evaluation.fingerprint import (
    describe_precision,
    model_fingerprint,
    token_fingerprint,
    tokenizer_fingerprint,
)
from hooklens.evaluation.interventions import find_interventions
from hooklens.evaluation.items import ContinuationItem, ItemError, ItemFile, MultipleChoiceItem, read_items
from hooklens.evaluation.multiple_choice import answer_item, check_target_delimiter
from hooklens.evaluation.prefix import Prefix, Text, make_prefix
from hooklens.evaluation.results_file import ResultsFile
from hooklens.evaluation.scoring import RowScore, plan_rows, score_together
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.workers import Engine, RayWorkers, Work, check_portable, read_engine


@dataclass(frozen=True, kw_only=True, repr=False)
class StreamSummary(Displayed):
    """What a run did.

    Attributes:
        n_scored: items scored in this run.
        n_found: items whose results were there already.
        errors: lines that could not be scored.
    """

    n_scored: int
    n_found: int
    errors: list[ItemError]

    def _summary(self) -> Summary:
        return Summary(
            title=f"StreamSummary: {self.n_scored:,} items scored, {self.n_found:,} were there already",
            listing=Listing(
                columns=("line", "error"),
                rows=[(str(one.line), one.message) for one in self.errors],
                what="lines that could not be scored",
                more="errors has all",
            ),
        )


@reads(
    edits=read_edits,
    progress=read_flag,
    on_errors=optional(partial(read_function, expected="a function of a list of ItemErrors")),
)
def score_file(
    model: HookedCausalLM,
    items: str | Path,
    results: str | Path,
    *,
    prefix: Text,
    target_delimiter: str = " ",
    batch_size: BatchSize = "auto",
    edits: Sequence[Edit] = (),
    prepend_bos: bool | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    progress: bool = True,
    on_errors: Callable[[list[ItemError]], object] | None = None,
) -> StreamSummary:
    """Score the items of a JSON Lines file behind one prefix, appending each result as a line of JSON.

    Results have the columns of `score_continuations` or `multiple_choice`, with `id` (match items by it: results
    come in another order; `read_items(path).items` has the ids of items without one) and `item`, a hash of the item.

    Results that the file holds already are kept and not computed again, so a run that was interrupted is finished by
    running it again. That is refused where something else would come out: another model (every entry of its weights
    counts), tokenizer, prefix, delimiter, precision, or other edits. What functions do (hooks, `Custom`) cannot be
    compared: where any act, the file must be a new one. One process at a time writes a file.

    All items are encoded and checked before the first is scored; those that cannot be are left out.

    Args:
        model: scores.
        items: the file, see `hooklens.evaluation.items`.
        results: the file to append to.
        prefix: what stands before every continuation and question.
        target_delimiter: see `multiple_choice`.
        batch_size: rows at once.
        edits: values from `hooklens.edits`, as in `score_continuations`.
        prepend_bos: for a prefix that is text.
        engine: `"ray"` scores on workers that Ray keeps, on this machine or on many; the results are the same, in the
            same order. A worker runs with as many threads as torch has here, or on a GPU of its own if the model lies
            on one.
        workers: of Ray, how many; None: as many as it has room for.
        progress: show a progress bar.
        on_errors: is called with the lines that cannot be scored, before any is scored.

    Raises:
        InputError: a file cannot be used, another process writes the results, or they belong to another run. Lines
            that cannot be scored do not raise; the summary lists them.
        MissingDependencyError: Ray is not installed.
        WorkerError: workers of Ray died at the same items again and again; results before these are kept.
    """
    where, n_workers = read_engine(engine, workers, what="score_file")
    if where == "ray":
        import_package("ray")
        check_portable(model, what="score_file")
    check_batch_size(batch_size)
    check_target_delimiter(target_delimiter)
    file = read_items(items)
    ready = make_prefix(model, prefix, edits=edits, prepend_bos=prepend_bos)
    encoded, faults = encode_items(model, file.items, ready)
    with ResultsFile(results, _describe_run(model, ready, target_delimiter)) as out:
        pending, taken = _leave_out_done(encoded, out.done)
        errors = _list_errors(file, {**faults, **taken})
        if errors and on_errors is not None:
            on_errors(errors)
        n_scored = 0
        with progress_bar("scoring", total=len(pending), unit="item", progress=progress) as bar:
            scoring = _Scoring(model, ready, target_delimiter, batch_size)
            for records in _score_pending(scoring, pending, where, n_workers, model.device):
                out.append(records)
                n_scored += len(records)
                bar.update(len(records))
    n_found = len(encoded) - len(taken) - n_scored
    return StreamSummary(n_scored=n_scored, n_found=n_found, errors=errors)


def _describe_run(model: HookedCausalLM, prefix: Prefix, target_delimiter: str) -> dict[str, Any]:
    """All that decides the numbers of an item."""
    acting = find_interventions(model, prefix.edits)
    return {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "prefix": token_fingerprint(prefix.tokens[0].tolist()),
        "edits": acting.fingerprint,
        "functions": list(acting.functions),
        "precision": describe_precision(),
        "target_delimiter": target_delimiter,
    }


def _leave_out_done(
    items: Mapping[int, EncodedItem], done: Mapping[str, str]
) -> tuple[list[EncodedItem], dict[int, str]]:
    """Items that have no result, and, by line, what is wrong with those whose id has the result of another item."""
    pending = []
    taken = {}
    for line, encoded in items.items():
        name = encoded.item.id
        if name not in done:
            pending.append(encoded)
        elif done[name] != encoded.fingerprint:
            taken[line] = (
                f"the results hold another item under the id {name!r}; give items ids of their own, or start with a "
                "new results file"
            )
    return pending, taken


def _list_errors(file: ItemFile, faults: Mapping[int, str]) -> list[ItemError]:
    found = [file.fault(line, message) for line, message in faults.items()]
    return sorted([*file.errors, *found], key=lambda error: error.line)


class _Scoring(Work):
    """Scores parts of the items behind a prefix.

    Args:
        model: scores.
        prefix: what stands before every item.
        target_delimiter, batch_size: as of `score_file`.
    """

    def __init__(self, model: HookedCausalLM, prefix: Prefix, target_delimiter: str, batch_size: BatchSize) -> None:
        self._model, self._prefix = model, prefix
        self._delimiter = target_delimiter
        self._batch_size: BatchSize = batch_size

    def cut(self, pending: Sequence[EncodedItem]) -> Iterator[list[EncodedItem]]:
        """Items that are scored together: continuations batch by batch, then questions one by one."""
        continuations = [encoded for encoded in pending if isinstance(encoded.item, ContinuationItem)]
        rows = [encoded.rows[0] for encoded in continuations]
        for batch in plan_rows(self._model, self._prefix, rows, batch_size=self._batch_size):
            yield [continuations[index] for index in batch]
        yield from ([encoded] for encoded in pending if isinstance(encoded.item, MultipleChoiceItem))

    def run(self, task: Sequence[EncodedItem]) -> list[dict[str, Any]]:
        """Their records."""
        if isinstance(task[0].item, MultipleChoiceItem):
            [encoded] = task
            record = answer_item(
                self._model, encoded, self._prefix, target_delimiter=self._delimiter, batch_size=self._batch_size
            )
            return [{**record, **_identify(encoded)}]
        rows = [encoded.rows[0] for encoded in task]
        scores = score_together(self._model, self._prefix, rows, may_halve=self._batch_size == "auto")
        return [
            _describe_continuation(self._model, encoded, score) for encoded, score in zip(task, scores, strict=True)
        ]


def _score_pending(
    scoring: _Scoring, pending: Sequence[EncodedItem], engine: Engine, workers: int | None, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Records of items as they are scored."""
    tasks = scoring.cut(pending)
    if engine == "local" or not pending:
        yield from map(scoring.run, tasks)
        return
    with RayWorkers(scoring, device=device, workers=workers, what="score_file") as team:
        yield from team.run(tasks)


def _describe_continuation(model: HookedCausalLM, encoded: EncodedItem, score: RowScore) -> dict[str, Any]:
    assert isinstance(encoded.item, ContinuationItem)
    described = describe_score(model, encoded.item.continuation, encoded.rows[0], score)
    return {**_identify(encoded), **described}


def _identify(encoded: EncodedItem) -> dict[str, str]:
    return {"id": encoded.item.id, "item": encoded.fingerprint}
