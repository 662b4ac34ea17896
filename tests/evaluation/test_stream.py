"""Tests of hooklens.evaluation.stream: each item once, whatever happens on the way."""

import json

import pytest
import torch

from hooklens import edits
from hooklens.errors import InputError
from hooklens.evaluation import multiple_choice, read_items, score_continuations, score_file
from tests.evaluation.networks import PREFIX, reader

LINES = [
    {"id": "1", "continuation": " John gave a drink to"},
    {"id": "ids", "tokens": [5, 6, 7]},
    {"id": "3", "question": " John gave a drink to", "choices": [" Mary", " John gave"], "answer": 0},
    {"id": "4", "continuation": " Mary"},
    {"id": "5", "continuation": " Mary said goodbye"},
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


class BrokenOffError(Exception):
    """Interrupts a run."""


@pytest.mark.parametrize("n_calls", range(1, 8))
def test_interrupted_run_is_finished_by_the_next(items, tmp_path, monkeypatch, n_calls):
    """Whatever call is interrupted, no item is lost, none is scored twice."""
    model = reader()
    out = tmp_path / "out.jsonl"
    calls = []
    embed = type(model.embed)
    forward = embed.forward

    def count(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) > n_calls:
            raise BrokenOffError
        return forward(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        # No hook: a run in which functions act cannot go on.
        patch.setattr(embed, "forward", count)
        with pytest.raises(BrokenOffError):
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
    """An item that is too long was found when its turn came; all are named before the first result is written."""
    with items.open("a") as file:
        file.write('nonsense\n{"tokens": [99999]}\n')
        file.write(json.dumps({"tokens": [4] * 60}) + "\n")
        file.write(json.dumps({"question": [4] * 60, "choices": [[4], [2]]}) + "\n")
        file.write('{"id": "good", "continuation": " John"}\n')
    out = tmp_path / "out.jsonl"
    told = []
    summary = score_file(
        reader(),
        items,
        out,
        prefix=PREFIX,
        progress=False,
        on_errors=lambda errors: told.append((errors, out.read_bytes())),
    )
    assert told == [(summary.errors, b"")]
    assert summary.n_scored == 7
    assert "good" in read_results(tmp_path / "out.jsonl")
    assert [error.line for error in summary.errors] == [7, 8, 9, 10]
    texts = [str(error) for error in summary.errors]
    assert texts[0].startswith(f"{items}, line 7: is not JSON")
    assert "line 8: token ids outside the vocabulary: 99999 (row 0, position 0)" in texts[1]
    assert "line 9: " in texts[2]
    assert "do not fit behind a prefix of 10 tokens" in texts[2]
    assert "do not fit behind a prefix of 70 tokens" in texts[3]


def test_items_may_be_added_and_none_may_change_under_its_id(items, tmp_path):
    model, out = reader(), tmp_path / "out.jsonl"
    score_file(model, items, out, prefix=PREFIX, progress=False)
    lines = items.read_text().splitlines()
    lines[3] = '{"id": "4", "continuation": " went"}'
    items.write_text("\n".join([*lines, '{"continuation": " John"}']))
    before = out.read_text()
    summary = score_file(model, items, out, prefix=PREFIX, progress=False)
    assert (summary.n_scored, summary.n_found) == (1, 5)
    [error] = summary.errors
    assert str(error).startswith(f"{items}, line 4: the results hold another item under the id '4'; give items ids")
    assert out.read_text().startswith(before)


def test_items_without_ids_are_found_again_wherever_they_stand(tmp_path):
    """Their line was their id: with a line put on top every item was another one under the id of the one before."""
    model, items, out = reader(), tmp_path / "items.jsonl", tmp_path / "out.jsonl"
    lines = [{key: value for key, value in line.items() if key != "id"} for line in LINES]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_file(model, items, out, prefix=PREFIX, progress=False)
    before = read_results(out)
    assert before.keys() == {item.id for item in read_items(items).items.values()}
    items.write_text("".join(json.dumps(line) + "\n" for line in [{"continuation": " went"}, *reversed(lines)]))
    summary = score_file(model, items, out, prefix=PREFIX, progress=False)
    assert (summary.n_scored, summary.n_found, summary.errors) == (1, 6, [])
    after = read_results(out)
    assert {name: after[name] for name in before} == before


def score_first(model, items, out, **options):
    """One item scored, the others still to come."""
    lines = items.read_text()
    items.write_text(lines.splitlines()[0])
    score_file(model, items, out, **{"prefix": PREFIX, "progress": False, **options})
    items.write_text(lines)


def zero_neuron(model):
    with torch.no_grad():
        model.blocks[1].mlp.W_out[11] = 0.0
    return {}


STREAM = "blocks.0.hook_resid_pre"

OTHER_RUNS = {
    "longer prefix": ("prefix", lambda model: {"prefix": PREFIX + " John"}),
    "prefix without BOS": ("prefix", lambda model: {"prepend_bos": False}),
    "dtype": ("model", lambda model: model.to(torch.float32) and {}),
    "one neuron": ("model", zero_neuron),
    "tokenizer": ("tokenizer", lambda model: model.tokenizer.add_tokens(["elsewhere"]) and {}),
    "an edit": ("edits", lambda model: {"edits": [edits.Zero(STREAM, pos=0)]}),
    "an edit that is attached": ("edits", lambda model: model.add_edit(edits.Scale(STREAM, 2.0)) and {}),
    "delimiter": ("target_delimiter", lambda model: {"target_delimiter": ""}),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_results_of_another_run_are_refused(items, tmp_path, name):
    """Attached edits were overlooked, and so was most of what can change in the weights."""
    key, change = OTHER_RUNS[name]
    model, out = reader.__wrapped__(), tmp_path / "out.jsonl"
    score_first(model, items, out)
    before = out.read_bytes()
    options = change(model)
    with pytest.raises(InputError, match=rf"results of another run: {key} is '.*?' there and '.*?' in this run"):
        score_file(model, items, out, **{"prefix": PREFIX, "progress": False, **options})
    assert out.read_bytes() == before


def test_edits_as_values_may_go_on_and_functions_may_not(items, tmp_path):
    """Hooks on the model were overlooked: results with and without them stood in one file."""
    model, out = reader(), tmp_path / "out.jsonl"
    vector = torch.linspace(-1, 1, 16, dtype=torch.float64)
    score_first(model, items, out, edits=[edits.Add(STREAM, vector)])
    summary = score_file(model, items, out, prefix=PREFIX, edits=[edits.Add(STREAM, vector.clone())], progress=False)
    assert (summary.n_found, summary.n_scored) == (1, 5)
    plain = score_continuations(model, PREFIX, [" Mary"], edits=[edits.Add(STREAM, vector)], progress=False)
    assert read_results(out)["4"]["logprob"] == pytest.approx(plain["logprob"][0], abs=1e-10)
    assert read_results(out)["4"]["logprob"] != pytest.approx(
        score_continuations(model, PREFIX, [" Mary"], progress=False)["logprob"][0], abs=1e-6
    )

    hooked = tmp_path / "hooked.jsonl"
    with model.hooks(fwd_hooks=[(STREAM, lambda tensor, hook: 2 * tensor)]):
        score_first(model, items, hooked)
        with pytest.raises(InputError, match=rf"functions act on the model in .*a hook at '{STREAM}'"):
            score_file(model, items, hooked, prefix=PREFIX, progress=False)
        assert score_file(model, items, tmp_path / "new.jsonl", prefix=PREFIX, progress=False).n_scored == 6
    with pytest.raises(InputError, match="functions act on the model in the run they are from"):
        score_file(model, items, hooked, prefix=PREFIX, progress=False)


def test_delimiter_reaches_the_readings(items, tmp_path):
    model = reader()
    for delimiter, removed in ((" ", 1), ("", 0)):
        out = tmp_path / f"out{removed}.jsonl"
        score_file(model, items, out, prefix=PREFIX, target_delimiter=delimiter, progress=False)
        record = read_results(out)["3"]
        lengths = [len(choice) - removed for choice in LINES[2]["choices"]]
        assert record["logprobs_norm"] == [a / b for a, b in zip(record["logprobs"], lengths, strict=True)]
