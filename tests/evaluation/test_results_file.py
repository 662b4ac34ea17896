"""Tests of hooklens.evaluation.results_file: what survives an interruption, and what is refused."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.evaluation.results_file import ResultsFile

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
    out.run_path.write_text("[]")
    with pytest.raises(InputError, match="results of another run"), ResultsFile(path, RUN):
        pass
    out.run_path.write_text("{")
    with pytest.raises(InputError, match=r"results.jsonl.run.json is not JSON"), ResultsFile(path, RUN):
        pass
    out.run_path.unlink()
    with pytest.raises(InputError, match=r"is not empty, and .*run.json is missing"), ResultsFile(path, RUN):
        pass
    assert path.read_bytes() == before


def test_line_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, RUN) as out:
        out.append([record(1)])
    path.write_bytes(path.read_bytes() + b'{"logprob": 1}\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 2: is no result"), ResultsFile(path, RUN):
        pass


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
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((number, path.read_bytes().count(b"\n"))))
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, {"model": "m"}) as results:
        number = results._file.fileno()
        results.append([{"id": "1", "item": "a"}, {"id": "2", "item": "b"}])
        results.append([{"id": "3", "item": "c"}])
    assert synced == [(number, 2), (number, 3)]
