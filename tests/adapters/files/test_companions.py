"""Tests of hooklens.adapters.files.companions: settings of generation and the record of processing travel along."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hooklens import HookedCausalLM
from hooklens.adapters.files.companions import read_transforms, write_transforms
from hooklens.errors import CheckpointError, InputError
from tests.checkpoints import build_variant, save_variant

IDS = torch.tensor([[5, 17, 80], [61, 2, 33]])


def generate(model) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=20, do_sample=False, verbose=False).tolist()


def test_end_tokens_of_the_generation_config_act_as_in_transformers(tmp_path) -> None:
    """`generation_config.json` was not read: chat models, whose end tokens are a list there, ran on."""
    hf_model = build_variant("llama-gqa")
    plain = hf_model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False, eos_token_id=96
    )
    ends = [int(plain[0, 7]), int(plain[1, 9])]
    hf_model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=3, do_sample=True, top_p=0.9)
    hf_model.save_pretrained(tmp_path / "theirs")
    expected = hf_model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False).tolist()
    assert len(expected[0]) < plain.shape[1]

    loaded = HookedCausalLM.from_pretrained(tmp_path / "theirs")
    assert generate(loaded) == expected
    assert generate(HookedCausalLM.from_hf(hf_model)) == expected
    loaded.save_pretrained(tmp_path / "ours")
    assert generate(HookedCausalLM.from_pretrained(tmp_path / "ours")) == expected
    for back in (AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), loaded.to_hf()):
        config = back.generation_config
        assert (config.eos_token_id, config.pad_token_id, config.top_p) == (ends, 3, 0.9)
    assert loaded.process_weights(fold_ln=True).generation_config == loaded.generation_config


def test_settings_of_an_older_checkpoint_do_not_stay(tmp_path) -> None:
    model = HookedCausalLM.from_pretrained(save_variant("llama-gqa", tmp_path))
    assert (tmp_path / "generation_config.json").exists()
    model.generation_config = {}
    model.save_pretrained(tmp_path)
    assert HookedCausalLM.from_pretrained(tmp_path).generation_config == {}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"eos_token_id": "two"}, r"generation_config\.json: 'eos_token_id' is 'two', expected a token id, a list"),
        ({"eos_token_id": [1, None]}, r"'eos_token_id' is \[1, None\]"),
        ({"eos_token_id": True, "pad_token_id": 0.5}, r"'eos_token_id' is True, .*; 'pad_token_id' is 0\.5, expected"),
    ],
)
def test_end_tokens_that_are_no_ids(tmp_path, config, said) -> None:
    save_variant("llama-gqa", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        HookedCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{"eos_token_id": "two"}, {"stop": torch.ones(1)}])
def test_settings_that_no_file_could_hold_are_refused_before_anything_is_replaced(tmp_path, config) -> None:
    model = HookedCausalLM.from_pretrained(save_variant("llama-gqa", tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.generation_config = config
    with pytest.raises(CheckpointError, match=r"model\.generation_config: "):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if "eos_token_id" in config:
        with pytest.raises(InputError, match=r"eos_token_id of model\.generation_config .*='two'; expected"):
            model.generate(IDS, verbose=False)


def test_the_record_is_read_back_and_none_is_written_for_plain_weights(tmp_path) -> None:
    assert read_transforms(tmp_path) == ()
    write_transforms(tmp_path, ())
    assert list(tmp_path.iterdir()) == []
    write_transforms(tmp_path, ("fold_ln", "center_unembed"))
    assert read_transforms(tmp_path) == ("fold_ln", "center_unembed")
    # As HookLens 0.1 wrote it.
    (tmp_path / "hooklens.json").write_text('{"transforms": ["fold_ln"]}')
    assert read_transforms(tmp_path) == ("fold_ln",)


def test_no_flipped_bit_gives_another_record(tmp_path) -> None:
    steps = ("fold_ln", "center_unembed")
    write_transforms(tmp_path, steps)
    path = tmp_path / "hooklens.json"
    written, refused = path.read_bytes(), 0
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_transforms(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            assert found == steps
    assert refused > 7 * len(written)
