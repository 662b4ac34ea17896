"""`hooklens demo`: what it computes, against plain hooks, and what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hooklens as hl
from hooklens.cli.demo import make_prompt_pair, patch_residual_stream
from hooklens.errors import InputError
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> hl.HookedCausalLM:
    return hl.HookedCausalLM.from_pretrained(checkpoint, dtype=torch.float64)


def test_prompt_pair_finds_the_names(model: hl.HookedCausalLM) -> None:
    pair = make_prompt_pair(model)
    assert (model.to_string(pair.answer), model.to_string(pair.wrong)) == ("Mary", "John")
    assert int((pair.clean != pair.corrupted).sum()) == 1


def test_prompt_pair_needs_a_tokenizer_that_knows_the_names(checkpoint: Path) -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "gave": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unaware = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    with pytest.raises(InputError, match=r"must differ in exactly one token.*makes \['\[UNK\]', .*knows both names"):
        make_prompt_pair(hl.HookedCausalLM.from_pretrained(checkpoint, tokenizer=unaware))


def test_patching_scores(model: hl.HookedCausalLM) -> None:
    """Entering layer 0 the runs differ at one token, so patching it gives the clean run and the rest nothing."""
    pair = make_prompt_pair(model)
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(pair.clean)
        values, clean, corrupted = patch_residual_stream(model, pair, cache)
        corrupted_logits = model(pair.corrupted)
    at = int((pair.clean != pair.corrupted)[0].nonzero()[0])
    expected = torch.zeros(values.shape[0])
    expected[at] = 1.0
    # float32 holds the scores: 2**-23 of 1, with room for the subtraction before.
    torch.testing.assert_close(values[:, 0], expected, atol=1e-6, rtol=0)
    for logits, difference in ((clean_logits, clean), (corrupted_logits, corrupted)):
        assert difference == pytest.approx(float(logits[0, -1, pair.answer] - logits[0, -1, pair.wrong]), abs=1e-12)


def test_patching_scores_equal_those_of_plain_hooks(model: hl.HookedCausalLM) -> None:
    pair = make_prompt_pair(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(pair.clean)
        values, clean, corrupted = patch_residual_stream(model, pair, cache)
        for layer, pos in [(1, 9), (2, -1), (3, 4)]:

            def put_back(stream: torch.Tensor, hook: hl.HookPoint, layer: int = layer, pos: int = pos) -> torch.Tensor:
                patched = stream.clone()
                patched[0, pos] = cache[f"blocks.{layer}.hook_resid_pre"][0, pos]
                return patched

            logits = model.run_with_hooks(pair.corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put_back)])
            score = (float(logits[0, -1, pair.answer] - logits[0, -1, pair.wrong]) - corrupted) / (clean - corrupted)
            assert float(values[pos, layer]) == pytest.approx(score, abs=1e-5)


def test_demo_on_a_model_that_cannot_do_the_task_says_so(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    blind = hl.HookedCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        blind.unembed.W_U.zero_()
    blind.save_pretrained(tmp_path)
    result = run("demo", "--model", tmp_path)
    assert result.exit_code == 0, result.output
    assert "This model answers both prompts alike" in result.stdout
    assert "nan" not in result.stdout


def check_tour(output: str) -> None:
    for heading in ("1  Predict", "2  Watch", "3  Patch", "4  Share a prefix"):
        assert f"\n{heading}\n" in output
    assert max(len(line) for line in output.splitlines()) <= 100
    best = re.search(r"next token[ |]+probability\n\S+\n'(\w+)'[ |]+([\d.]+)", output)
    assert best is not None
    assert best[1] == "Mary"
    assert float(best[2]) > 0.5
    # The subject stands at position 10; entering layer 0 the whole answer sits there.
    (subject,) = [line for line in output.splitlines() if re.match(r"10 \w+ ", line)]
    assert re.findall(r"\d\.\d\d", subject)[0] == "1.00"
    for text, name in [("John gave a drink to", "Mary"), ("Mary gave a drink to", "John")]:
        assert re.search(rf"\.\.\. {text}[ |]+'{name}'", output)
    difference = re.search(r"largest difference\s+is\s+([\de.+-]+)\.\n", output)
    assert difference is not None
    # float32 logits of size ten in another summation order.
    assert float(difference[1]) < 1e-4


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_demo_on_the_bundled_models(run: Run, name: str) -> None:
    result = run("demo", "--model", f"bundled:{name}")
    assert result.exit_code == 0, result.output
    check_tour(result.stdout)


def test_demo_as_a_program_offline_and_into_a_plain_file() -> None:
    """A terminal is not needed, nor UTF-8, nor a network."""
    done = subprocess.run(
        [sys.executable, "-m", "hooklens.cli", "demo"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    check_tour(done.stdout.decode("ascii").replace("-+-", "---"))
