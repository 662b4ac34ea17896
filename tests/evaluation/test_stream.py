"""Tests of hooklens.evaluation.stream: each item once, whatever happens on the way."""

import json

import pytest
import torch

from hooklens.errors import InputError
from hooklens.evaluation import multiple_choice, score_continuations, score_file
from tests.evaluation.networks import PREFIX, reader

LINES = [
    {"continuation": " John gave a drink to"},
    {"id": "ids", "tokens": [5, 6, 7]},
    {"question": " John gave a drink to", "choices": [" Mary", " John gave"], "answer": 0},
    {"continuation": " Mary"},
    {"continuation": " Mary said goodbye"},
    {"id": "who", "question": " Mary", "choices": [" gave", " said goodbye to"]},
]


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def read_results(path) -> dict[str, dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_results_are_those_of_the_tables(items, tmp_path):
    model = reader()
    summary = score_file(model, items, tmp_path / "out.jsonl", prefix=PREFIX, progress=False)
    assert (summary.n_scored, summary.n_found, summary.errors) == (6, 0, [])
    results = read_results(tmp_path / "out.jsonl")
    texts = {"1": " John gave a drink to", "4": " Mary", "5": " Mary said goodbye", "ids": [5, 6, 7]}
    table = score_continuations(model, PREFIX, list(texts.values()), progress=False)
    for name, (_, row) in zip(texts, table.iterrows(), strict=True):
        for key in ("tokens", "n_tokens", "continuation", "is_greedy"):
            assert results[name][key] == row[key]
        assert results[name]["logprob"] == pytest.approx(row["logprob"], abs=1e-10)
    answers = multiple_choice(model, [LINES[2], LINES[5]], prefix=PREFIX, progress=False)
    for name, (_, row) in zip(("3", "who"), answers.iterrows(), strict=True):
        assert results[name]["logprobs"] == pytest.approx(row["logprobs"], abs=1e-10)
        assert results[name]["predicted"] == row["predicted"]


class BrokenHookError(Exception):
    """Interrupts a run."""


@pytest.mark.parametrize("n_calls", range(1, 8))
def test_interrupted_run_is_finished_by_the_next(items, tmp_path, n_calls):
    """Whatever call is interrupted, no item is lost, none is scored twice."""
    model = reader()
    out = tmp_path / "out.jsonl"
    calls = []

    def count(tensor, hook):
        calls.append(len(tensor))
        if len(calls) > n_calls:
            raise BrokenHookError

    with model.hooks(fwd_hooks=[("hook_embed", count)]), pytest.raises(BrokenHookError):
        score_file(model, items, out, prefix=PREFIX, batch_size=1, progress=False)
    before = out.read_text()
    with out.open("a") as file:
        file.write('{"id": "3", "logpr')
    summary = score_file(model, items, out, prefix=PREFIX, batch_size=1, progress=False)
    assert summary.n_found == len(before.splitlines())
    assert summary.n_scored == 6 - summary.n_found
    assert out.read_text().startswith(before)
    whole = tmp_path / "whole.jsonl"
    score_file(model, items, whole, prefix=PREFIX, batch_size=1, progress=False)
    assert read_results(out) == read_results(whole)
    assert score_file(model, items, out, prefix=PREFIX, progress=False).n_found == 6


def test_faulty_lines_are_named_and_the_others_scored(items, tmp_path):
    with items.open("a") as file:
        file.write('nonsense\n{"tokens": [99999]}\n')
        file.write(json.dumps({"tokens": [4] * 60}) + "\n")
        file.write(json.dumps({"question": [4] * 60, "choices": [[4], [2]]}) + "\n")
        file.write('{"id": "good", "continuation": " John"}\n')
    summary = score_file(reader(), items, tmp_path / "out.jsonl", prefix=PREFIX, progress=False)
    assert summary.n_scored == 7
    assert "good" in read_results(tmp_path / "out.jsonl")
    assert [error.line for error in summary.errors] == [7, 8, 9, 10]
    texts = [str(error) for error in summary.errors]
    assert texts[0].startswith(f"{items}, line 7: is not JSON")
    assert "line 8: token ids outside the vocabulary: 99999 (row 0, position 0)" in texts[1]
    assert "line 9: " in texts[2]
    assert "do not fit behind a prefix of 10 tokens" in texts[2]
    assert "needs 70 positions" in texts[3]


def test_items_may_be_added_and_none_may_change_under_its_id(items, tmp_path):
    model, out = reader(), tmp_path / "out.jsonl"
    score_file(model, items, out, prefix=PREFIX, progress=False)
    lines = items.read_text().splitlines()
    lines[3] = '{"continuation": " went"}'
    items.write_text("\n".join([*lines, '{"continuation": " John"}']))
    before = out.read_text()
    summary = score_file(model, items, out, prefix=PREFIX, progress=False)
    assert (summary.n_scored, summary.n_found) == (1, 5)
    [error] = summary.errors
    assert str(error).startswith(f"{items}, line 4: the results hold another item under the id '4'; give items ids")
    assert out.read_text().startswith(before)


def test_results_of_another_model_or_prefix_are_refused(items, tmp_path):
    model, out = reader(), tmp_path / "out.jsonl"
    score_file(model, items, out, prefix=PREFIX, progress=False)
    with pytest.raises(InputError, match=r"results of another run: prefix is '\w{16}' there and '\w{16}' in this run"):
        score_file(model, items, out, prefix=PREFIX + " John", progress=False)
    with pytest.raises(InputError, match="results of another run: model is"):
        score_file(reader.__wrapped__().to(torch.float32), items, out, prefix=PREFIX, progress=False)
