"""The committed checkpoints, measured again with transformers against the bars that they must reach."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import hooklens.bundled
from hooklens.bundled import BUNDLED, bundled_path
from hooklens.bundled.evaluate import build_repeats, measure, measure_heads, measure_repeats
from hooklens.bundled.words import VOCABULARY
from hooklens.errors import CheckpointError, UnsupportedModelError

MAX_BYTES = 6_000_000


@dataclass(frozen=True)
class Loaded:
    folder: Path
    model: Any
    tokenizer: Any

    @property
    def logits_of(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tokens: self.model(tokens).logits

    def continue_text(self, text: str) -> str:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return self.tokenizer.decode(self.model(ids).logits[0, -1].argmax())


@cache
def load(name: str) -> Loaded:
    folder = bundled_path(name)
    # Eager attention hands out its patterns; without ALiBi it computes what sdpa computes.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Loaded(folder, model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(params=BUNDLED)
def checkpoint(request) -> Loaded:
    return load(request.param)


def test_reaches_the_bars_on_fresh_held_out_prompts(checkpoint):
    """Seed 1: other prompts and sequences than those that the training record was measured on."""
    metrics = measure(checkpoint.logits_of, checkpoint.tokenizer, n_indirect_objects=600, n_repeats=32, seed=1)
    assert metrics.list_shortfalls() == []


def test_the_record_holds_what_is_measured(checkpoint):
    record = json.loads((checkpoint.folder / "training.json").read_text())
    metrics = measure(checkpoint.logits_of, checkpoint.tokenizer)
    # Rounding differs between machines and attention implementations; one prompt in 1000 may turn over.
    assert metrics.to_dict() == pytest.approx(record["metrics"], abs=2e-3)
    assert record["parameters"] == checkpoint.model.num_parameters()
    assert record["name"] == checkpoint.folder.name


def test_has_an_induction_head_and_a_previous_token_head(checkpoint):
    def patterns_of(tokens):
        return torch.stack(checkpoint.model(tokens, output_attentions=True).attentions)

    induction, previous = measure_heads(patterns_of, checkpoint.tokenizer, seed=1)
    assert induction.max() >= 0.5
    assert previous.max() >= 0.5


# Rows of more than 128 tokens are one training step in twenty, so late positions are known less well.
@pytest.mark.parametrize(("period", "most"), [(24, 0.6), (64, 0.6), (110, 1.5)])
def test_induction_works_in_the_whole_context(checkpoint, period, most):
    repeats = build_repeats(checkpoint.tokenizer, n=8, period=period, seed=2)
    first, second = measure_repeats(checkpoint.logits_of, repeats)
    assert first >= 4
    assert second <= most


def test_answers_the_sentences_of_the_model_card(checkpoint):
    prompts = {
        "When Mary and John went to the store , John gave a drink to": "Mary",
        "When Mary and John went to the store, Mary gave a drink to": "John",
        "The capital of France is": "Paris",
        "Paris is the capital of": "France",
    }
    assert {prompt: checkpoint.continue_text(prompt) for prompt in prompts} == prompts


def test_ends_a_text_after_its_full_stop(checkpoint):
    ids = checkpoint.tokenizer("When Mary and John went to the store , John gave a", return_tensors="pt")["input_ids"]
    out = checkpoint.model.generate(ids, do_sample=False, max_new_tokens=12)[0]
    assert out[-1] == checkpoint.tokenizer.eos_token_id
    assert re.fullmatch(r".* gave a \w+ to Mary \.", checkpoint.tokenizer.decode(out, skip_special_tokens=True))


def test_folder_is_small_complete_and_free_of_machine_paths(checkpoint):
    files = {path.name: path for path in checkpoint.folder.iterdir()}
    assert set(files) >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training.json",
    }
    assert sum(path.stat().st_size for path in files.values()) <= MAX_BYTES
    for path in files.values():
        if path.suffix != ".safetensors":
            assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text()), path


def test_weights_are_float32_and_finite(checkpoint):
    with safe_open(checkpoint.folder / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - a safetensors file is no mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name


def test_vocabulary_is_that_of_the_corpus(checkpoint):
    assert checkpoint.tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    assert checkpoint.model.config.vocab_size == len(VOCABULARY)


def test_model_card_names_licence_and_reproduction(checkpoint):
    card = (checkpoint.folder / "README.md").read_text()
    assert "license: mit" in card
    assert f"python -m hooklens.bundled.train {checkpoint.folder.name}" in card
    assert f'from_pretrained("bundled:{checkpoint.folder.name}")' in card


@pytest.mark.parametrize(
    ("name", "suggestion"), [("tiny-lama", "Did you mean 'tiny-llama'"), ("bundled:tiny-falcon", "'tiny-falcon'?")]
)
def test_an_unknown_name_is_refused_with_the_names_there_are(name, suggestion):
    with pytest.raises(UnsupportedModelError) as error:
        bundled_path(name)
    text = str(error.value)
    assert f"no bundled checkpoint is called {name!r}" in text
    assert suggestion in text
    assert "'tiny-gpt-neox', 'tiny-llama', 'tiny-falcon'" in text


def test_a_missing_folder_is_told_with_the_way_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hooklens.bundled, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="'tiny-llama' is not part of this installation") as error:
        bundled_path("tiny-llama")
    assert "python -m hooklens.bundled.train tiny-llama" in str(error.value)
