"""`hooklens record`: a folder that `ActivationDataset` reads, and refusals in words."""

import json
from pathlib import Path

import torch

from hooklens import HookedCausalLM
from hooklens.datasets import ActivationDataset
from tests.cli.conftest import Run

TEXTS = ["Mary gave a drink to John .", "When Mary and John went to the store , John gave a drink to Mary ."]


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_records_what_the_model_computes(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    corpus = write_corpus(tmp_path)
    arguments = ["record", str(checkpoint), str(corpus), str(out), "--site", "resid_post", "--position", "-1"]
    result = run(*arguments, "--no-progress")
    assert result.exit_code == 0, result.output
    found = ActivationDataset(out)
    assert result.stdout.startswith(f"2 tokens of {len(found.sites)} hook points")
    model = HookedCausalLM.from_pretrained(checkpoint)
    for number, text in enumerate(TEXTS):
        _, cache = model.run_with_cache(text)
        # float32, and another row length.
        torch.testing.assert_close(found[number][found.sites[-1]], cache["resid_post", -1][0, -1], rtol=1e-4, atol=1e-4)
    again = run(*arguments, "--no-progress")
    assert again.stdout == result.stdout


def test_refusals(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    wrong = run("record", str(checkpoint), str(corpus), str(tmp_path / "a"), "--site", "resid_post", "--dtype", "int8")
    assert wrong.exit_code == 2
    assert "--dtype is 'int8'" in wrong.stderr
    missing = run("record", str(checkpoint), str(tmp_path / "no.jsonl"), str(tmp_path / "b"), "--site", "resid_post")
    assert missing.exit_code == 2
    assert "there is no file" in missing.stderr
