"""Tests of hooklens.evaluation.results_file: what survives an interruption, and what is refused."""

import contextlib
import errno
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.evaluation.results_file import ResultsFile
from tests.forks import needs_fork, run_in_child, wait_for

RUN = {"model": "m", "prefix": "p"}


def record(number: int) -> dict:
    return {"id": str(number), "item": f"hash {number}", "logprob": -1.5 * number}


def test_results_are_found_again(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        assert out.done == {}
        out.append([record(1), record(2)])
    with ResultsFile(path, RUN) as out:
        assert out.done == {"1": "hash 1", "2": "hash 2"}
        out.append([record(3)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record(1), record(2), record(3)]


def test_results_reach_the_file_as_they_come(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
        assert len(path.read_text().splitlines()) == 1


@settings(max_examples=30)
@given(n=st.integers(1, 4), cut=st.integers(0, 200))
def test_file_cut_anywhere_loses_at_most_its_last_line(tmp_path_factory, n, cut):
    path = tmp_path_factory.mktemp("cut") / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(i) for i in range(n)])
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with ResultsFile(path, RUN) as out:
        n_complete = whole[:cut].count(b"\n")
        assert list(out.done) == [str(i) for i in range(n_complete)]
        out.append([record(i) for i in range(n_complete, n)])
    assert path.read_bytes() == whole


def test_another_runs_results_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
    before = path.read_bytes()
    text = r"results of another run: model is 'm' there and 'other' in this run. choose another file, or delete it"
    with pytest.raises(InputError, match=text), ResultsFile(path, {**RUN, "model": "other"}):
        pass
    out.run_path.unlink()
    with pytest.raises(InputError, match=r"is not empty, and .*run.json is missing"), ResultsFile(path, RUN):
        pass
    assert path.read_bytes() == before


DAMAGED_RUNS = [b"[]", b"{", b"", b"\xff\xfe", b"null", b"7" * 5000, b"[" * 100_000, b'{"format": 1}']


@pytest.mark.parametrize("content", DAMAGED_RUNS, ids=lambda content: str(content[:12]))
def test_damaged_record_of_the_run_is_named(tmp_path, content):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
    before = path.read_bytes()
    out.run_path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"results.jsonl.run.json is damaged|results of another run: format is 1 there"
    ):
        ResultsFile(path, RUN).__enter__()
    assert path.read_bytes() == before
    out.run_path.unlink()
    out.run_path.mkdir()
    with pytest.raises(InputError, match=r"cannot use .*results.jsonl for results: .*run.json: Is a directory"):
        ResultsFile(path, RUN).__enter__()


DAMAGED_LINES = [
    b'{"logprob": 1}',
    b'{"id": 1, "item": "x"}',
    b'{"id": "1", "item": null}',
    b'{"id": ["1"], "item": "x"}',
    b"[]",
    b"",
    b"\xff\xfe",
    b"nonsense",
    b'{"id": "2", "item": "x", "n": ' + b"7" * 5000 + b"}",
    b"[" * 100_000,
    json.dumps(record(1)).encode(),
]


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: str(line[:30]))
def test_line_that_is_no_result_is_named(tmp_path, line):
    """Lines nested deeply, or with integers of thousands of digits, were tracebacks; a second result passed."""
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=r"results.jsonl, line 2: is no result"):
        ResultsFile(path, RUN).__enter__()
    # The lock is open again.
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    with ResultsFile(path, RUN) as out:
        assert out.done == {"1": "hash 1"}


@settings(max_examples=60)
@given(data=st.data())
def test_damage_of_any_kind_is_an_error_in_words_or_leaves_the_results_as_they_were(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(i) for i in range(3)])
    target = data.draw(st.sampled_from([path, out.run_path]))
    content = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    target.write_bytes(content)
    refused = pytest.raises(InputError, match=re.escape(str(path)))
    with contextlib.suppress(pytest.fail.Exception), refused, ResultsFile(path, RUN) as out:
        # Where the run and all lines still say what they must, there is nothing to refuse.
        assert all(isinstance(value, str) for pair in out.done.items() for value in pair)


FUNCTIONS = {**RUN, "functions": ["a hook at 'hook_embed'"]}


@pytest.mark.parametrize("runs", [(FUNCTIONS, RUN), (RUN, FUNCTIONS), (FUNCTIONS, FUNCTIONS)])
def test_runs_in_which_functions_act_cannot_go_on(tmp_path, runs):
    path = tmp_path / "results.jsonl"
    first, second = runs
    with ResultsFile(path, first) as out:
        pass
    with ResultsFile(path, first) as out:
        out.append([record(1)])
    with pytest.raises(
        InputError, match=r"functions act on the model in .*: \"a hook at 'hook_embed'\". Whether they do"
    ):
        ResultsFile(path, second).__enter__()


def test_one_run_at_a_time_writes_a_file(tmp_path):
    """Two processes on one file wrote every row twice."""
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
        with pytest.raises(InputError, match=r"another process is writing results to .*results.jsonl; wait until it"):
            ResultsFile(path, RUN).__enter__()
        out.append([record(2)])
        with ResultsFile(tmp_path / "other.jsonl", RUN):
            pass
    with ResultsFile(path, RUN) as out:
        assert list(out.done) == ["1", "2"]


@needs_fork
def test_the_lock_of_a_process_that_was_killed_is_open(tmp_path):
    path = tmp_path / "results.jsonl"
    says, hears = os.pipe()

    def hold():
        with ResultsFile(path, RUN) as out:
            out.append([record(1)])
            os.write(hears, b"holds")
            signal.pause()

    child = run_in_child(hold)
    assert os.read(says, 5) == b"holds"
    with pytest.raises(InputError, match="another process is writing"):
        ResultsFile(path, RUN).__enter__()
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL
    os.close(says)
    os.close(hears)
    with ResultsFile(path, RUN) as out:
        assert out.done == {"1": "hash 1"}


def test_failed_writes_are_told_in_words_and_what_was_written_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    fsync = os.fsync

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(InputError, match=r"cannot use .*results.jsonl: No space left"):
            out.append([record(2)])
    assert list(out.done) == ["1"]
    monkeypatch.setattr(os, "fsync", fsync)
    with ResultsFile(path, RUN) as out:
        assert set(out.done) >= {"1"}
    with pytest.raises(InputError, match="is no regular file"):
        ResultsFile(tmp_path, RUN).__enter__()
    for nameless in ("/", "."):
        with pytest.raises(InputError, match=r"it is a folder; give the name of a file"):
            ResultsFile(nameless, RUN)


def test_record_of_the_run_is_put_in_place_whole(tmp_path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda draft, target: (replaced.append(Path(target)), replace(draft, target)))
    with ResultsFile(tmp_path / "results.jsonl", RUN) as out:
        assert replaced == [out.run_path]
    names = {"results.jsonl", "results.jsonl.run.json", "results.jsonl.lock"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_folder_must_exist(tmp_path):
    with pytest.raises(InputError, match="does not exist"), ResultsFile(tmp_path / "no" / "results.jsonl", RUN):
        pass


def test_numbers_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([{**record(1), "per_byte": math.nan, "each": [-math.inf, 1.0]}])
    found = json.loads(path.read_text())
    assert (found["per_byte"], found["each"]) == (None, [None, 1.0])


def test_results_reach_the_disk_before_the_next_are_computed(tmp_path, monkeypatch):
    """One sync for each batch of results, when all its lines are in the file."""
    synced = []
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, {"model": "m"}) as results:
        monkeypatch.setattr(os, "fsync", lambda number: synced.append((number, path.read_bytes().count(b"\n"))))
        number = results._file.fileno()
        results.append([{"id": "1", "item": "a"}, {"id": "2", "item": "b"}])
        results.append([{"id": "3", "item": "c"}])
    assert synced == [(number, 2), (number, 3)]
