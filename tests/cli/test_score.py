"""`hooklens score`: results, errors by line, and a run that is killed half-way and finished later."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hooklens.evaluation.results_file import ResultsFile
from tests.cli.conftest import Run
from tests.forks import needs_fork, run_in_child, wait_for

PREFIX = "When Mary and John went to the store ,"
# A word of the vocabulary, since the tokenizer knows whole words only.
WORDS = ["John", "Mary", "gave", "a", "drink", "to"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    prefix, items, out = tmp_path / "prefix.txt", tmp_path / "items.jsonl", tmp_path / "results.jsonl"
    prefix.write_text(PREFIX + "\n")
    lines = [{"id": i + 1, "continuation": " " + " ".join(WORDS[: 1 + i % 6])} for i in range(12)]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prefix, items, out


def arguments(checkpoint: Path, files: tuple[Path, Path, Path]) -> list[str]:
    prefix, items, out = files
    options = ["--prefix", prefix, "--items", items, "--out", out, "--batch-size", "1", "--no-progress"]
    return ["score", str(checkpoint), *map(str, options)]


def read_results(path: Path) -> dict[str, float]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    results = {record["id"]: record["logprob"] for record in records}
    assert len(results) == len(records)
    return results


def test_items_are_scored_behind_the_prefix(run: Run, checkpoint: Path, files: tuple[Path, Path, Path]) -> None:
    from hooklens import HookedCausalLM
    from hooklens.evaluation import score_continuations

    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{files[2]}: 12 items scored\n"
    texts = [json.loads(line)["continuation"] for line in files[1].read_text().splitlines()]
    model = HookedCausalLM.from_pretrained(checkpoint)
    expected = score_continuations(model, PREFIX, texts, progress=False)["logprob"].tolist()
    found = read_results(files[2])
    # Batches of another size are summed in another order; sums are of about 40 nats in float32.
    assert [found[str(i)] for i in range(1, 13)] == pytest.approx(expected, abs=1e-4)
    again = run(*arguments(checkpoint, files))
    assert again.stdout == f"{files[2]}: 0 items scored, 12 were there already\n"


def test_faulty_lines_are_named_and_the_exit_code_says_so(
    run: Run, checkpoint: Path, files: tuple[Path, Path, Path]
) -> None:
    with files[1].open("a") as file:
        file.write('{"continuation": ""}\n')
    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 1
    assert result.stderr == f"hooklens: {files[1]}, line 13: 'continuation' is empty: there is nothing to score\n"
    assert result.stdout == f"{files[2]}: 12 items scored, 1 could not be scored\n"


def test_files_that_cannot_be_read_are_errors(run: Run, checkpoint: Path, files: tuple[Path, Path, Path]) -> None:
    prefix, items, _ = files
    prefix.write_bytes(b"\xff\xfe")
    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 2
    assert f"the prefix in {prefix} is not UTF-8 text" in result.stderr
    prefix.unlink()
    assert f"cannot read the prefix from {prefix}: No such file" in run(*arguments(checkpoint, files)).stderr
    prefix.write_text(PREFIX)
    items.unlink()
    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 2
    assert f"cannot read items from {items}" in result.stderr


def send_after_five(kind: signal.Signals) -> None:
    """Have this process send itself a signal once five results stand in the file."""
    append, calls = ResultsFile.append, itertools.count(1)

    def append_and_send(self: ResultsFile, records: Any) -> None:
        append(self, records)
        if next(calls) == 5:
            os.kill(os.getpid(), kind)

    ResultsFile.append = append_and_send  # type: ignore[method-assign]


@needs_fork
def test_killed_run_is_finished_by_the_next(run: Run, checkpoint: Path, files: tuple[Path, Path, Path]) -> None:
    """The process is killed once five results stand in the file, which then also ends in half a line.

    It kills itself at that point: a test that watched the file and killed from outside came too late where its own
    process had to wait for a core.
    """
    prefix, _, out = files

    def work() -> None:
        send_after_five(signal.SIGKILL)
        run(*arguments(checkpoint, files))

    assert wait_for(run_in_child(work)) == -signal.SIGKILL
    before = out.read_bytes()
    assert before.count(b"\n") == 5
    done = {json.loads(line)["id"] for line in before.splitlines()}
    out.write_bytes(before + b'{"id": "2", "logp')
    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 0, result.output
    assert read_results(out).keys() == {str(i) for i in range(1, 13)}
    assert out.read_bytes().startswith(before)
    assert f"{12 - len(done)} items scored, {len(done)} were there already" in result.stdout
    assert prefix.read_text() == PREFIX + "\n"


@needs_fork
def test_interrupted_run_says_what_is_kept_and_is_finished_by_the_next(
    run: Run, checkpoint: Path, files: tuple[Path, Path, Path]
) -> None:
    out = files[2]

    def work() -> None:
        # As an interpreter has it that was just started.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        send_after_five(signal.SIGINT)
        interrupted = run(*arguments(checkpoint, files))
        assert interrupted.exit_code == 130
        told = f"hooklens: interrupted; results so far are kept in {out}; run the same command again"
        assert told in interrupted.stderr
        assert "Traceback" not in interrupted.stderr

    assert wait_for(run_in_child(work)) == 0
    assert len(read_results(out)) == 5
    result = run(*arguments(checkpoint, files))
    assert result.stdout == f"{out}: 7 items scored, 5 were there already\n"
    assert len(read_results(out)) == 12


def test_a_file_that_another_process_writes_is_refused(
    run: Run, checkpoint: Path, files: tuple[Path, Path, Path]
) -> None:
    """Two processes on one file wrote every row twice."""
    with FileLock(files[2].with_name(files[2].name + ".lock")):
        result = run(*arguments(checkpoint, files))
    assert result.exit_code == 2
    assert f"hooklens: another process is writing results to {files[2]}; wait until it has finished" in result.stderr
    assert not files[2].exists()
    assert run(*arguments(checkpoint, files)).exit_code == 0


def test_delimiter_is_handed_on(run: Run, checkpoint: Path, files: tuple[Path, Path, Path]) -> None:
    _, items, out = files
    items.write_text(json.dumps({"id": "1", "question": " John gave", "choices": [" a", " a drink"], "answer": 1}))
    assert run(*arguments(checkpoint, files), "--target-delimiter", "").exit_code == 0
    record = json.loads(out.read_text())
    assert record["logprobs_norm"] == [record["logprobs"][0] / 2, record["logprobs"][1] / 8]
    result = run(*arguments(checkpoint, files))
    assert result.exit_code == 2
    assert "target_delimiter is '' there and ' ' in this run" in result.stderr
