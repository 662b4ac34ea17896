import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hooklens.adapters import build_hf_model, export, open_checkpoint, read_hf_model, write_checkpoint
from hooklens.errors import CheckpointError
from tests.checkpoints import VARIANTS, build_variant, load_apart, save_variant

IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folders_load_in_transformers_with_equal_logits(name, tmp_path) -> None:
    hf_model = build_variant(name)
    cfg, state = read_hf_model(hf_model)
    write_checkpoint(tmp_path, cfg, state, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert torch.equal(reloaded(IDS).logits, hf_model(IDS).logits)
    again = open_checkpoint(tmp_path)
    assert again.cfg == cfg
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.tensors())


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_model_in_memory_has_equal_logits(name) -> None:
    hf_model = build_variant(name)
    cfg, state = read_hf_model(hf_model)
    built = build_hf_model(cfg, state)
    assert not built.training
    assert type(built) is type(hf_model)
    with torch.no_grad():
        assert torch.equal(built(IDS).logits, hf_model(IDS).logits)


def test_fresh_configs_are_saved_through_a_family_that_can_express_them(tmp_path) -> None:
    for name in ("neox-sequential", "llama-biases", "falcon-40b"):
        hf_model = build_variant(name)
        cfg, state = read_hf_model(hf_model)
        with torch.no_grad():
            built = build_hf_model(cfg.replace(origin=None), state)
            # Another family's code may order the same sums differently.
            torch.testing.assert_close(built(IDS).logits, hf_model(IDS).logits)


def test_a_subset_of_layers_is_a_whole_checkpoint(tmp_path) -> None:
    checkpoint = open_checkpoint(save_variant("falcon-11b", tmp_path))
    write_checkpoint(tmp_path / "last", checkpoint.config_for([1]), dict(checkpoint.tensors([1])))
    short, whole = AutoModelForCausalLM.from_pretrained(tmp_path / "last"), build_variant("falcon-11b")
    whole.transformer.h = whole.transformer.h[1:]
    whole.transformer.h[0].self_attention.layer_idx = 0
    with torch.no_grad():
        assert torch.equal(short(IDS).logits, whole(IDS).logits)


def test_dtype_on_disk(tmp_path) -> None:
    cfg, state = read_hf_model(build_variant("llama-tied"))
    write_checkpoint(tmp_path, cfg, state, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_apart(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_checkpoint(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_saving_into_the_folder_it_was_read_from(max_shard_size, tmp_path) -> None:
    """The tensors are views of the mapped file: writing over it would change or tear them."""
    checkpoint = open_checkpoint(save_variant("llama-gqa", tmp_path))
    expected = {key: tensor.clone() for key, tensor in checkpoint.tensors()}
    state = dict(checkpoint.tensors())
    write_checkpoint(tmp_path, checkpoint.cfg, state, max_shard_size=max_shard_size)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in open_checkpoint(tmp_path).tensors())


def test_files_of_an_older_save_do_not_stay(tmp_path) -> None:
    """transformers takes model.safetensors before an index: one left behind would be loaded instead."""
    cfg, state = read_hf_model(build_variant("neox-parallel"))
    write_checkpoint(tmp_path, cfg, {key: torch.zeros_like(tensor) for key, tensor in state.items()})
    write_checkpoint(tmp_path, cfg, state, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    write_checkpoint(tmp_path, cfg, state)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    cfg, state = read_hf_model(build_variant("neox-parallel"))
    write_checkpoint(tmp_path, cfg, state)
    files, written = {path.name for path in tmp_path.iterdir()}, []

    def fail_at_the_second_file(tensors, path, metadata):
        written.append(path)
        path.write_bytes(b"half")
        if len(written) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(export, "save_file", fail_at_the_second_file)
    other = {key: tensor + 1 for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"the save failed, and nothing in the folder changed \(disk full\)"):
        write_checkpoint(tmp_path, cfg, other, max_shard_size="20KB")
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(torch.equal(tensor, state[key]) for key, tensor in open_checkpoint(tmp_path).tensors())


def test_saving_beside_an_adapter_is_refused(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    cfg, state = read_hf_model(build_variant("llama-gqa"))
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter .* save into another folder"):
        write_checkpoint(tmp_path, cfg, state)


def test_parameters_that_share_storage_are_saved_apart(tmp_path) -> None:
    cfg, state = read_hf_model(build_variant("llama-tied"))
    cfg = cfg.replace(tied_unembed=False)
    write_checkpoint(tmp_path, cfg, state)
    weights = load_apart(tmp_path / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert open_checkpoint(tmp_path).cfg == cfg


def test_a_file_is_no_folder(tmp_path) -> None:
    (tmp_path / "taken").touch()
    cfg, state = read_hf_model(build_variant("llama-gqa"))
    with pytest.raises(CheckpointError, match="taken: is a file; expected a folder to save into"):
        write_checkpoint(tmp_path / "taken", cfg, state)
