"""Which format a file or folder is in."""

import json
from pathlib import Path

import pytest
import torch

import hooklens
from hooklens import HookedCausalLM
from hooklens.adapters.formats import find_format
from hooklens.adapters.sources import LocalFiles
from hooklens.errors import CheckpointError, InputError
from tests.adapters.formats.test_nanogpt import build, save, state_of
from tests.checkpoints import save_variant


def test_the_hubs_layout_goes_first(tmp_path) -> None:
    """Meta's own files may lie beside those of the hub."""
    save_variant("llama-gqa", tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8}))
    torch.save({}, tmp_path / "consolidated.00.pth")
    assert find_format(LocalFiles(tmp_path)) is None
    assert HookedCausalLM.from_pretrained(tmp_path).cfg.n_layers == 3


def test_folders_and_files_of_other_things(tmp_path) -> None:
    assert find_format(LocalFiles(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_format(LocalFiles(tmp_path), file="model.safetensors") is None
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a file; expected the folder"):
        HookedCausalLM.from_pretrained(tmp_path / "model.safetensors")


def test_a_subfolder_and_what_does_not_go_with_it(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "ckpt.pt", state_of(build()))
    assert HookedCausalLM.from_pretrained(tmp_path, subfolder="out").cfg.n_layers == 2
    assert hooklens.download(tmp_path, subfolder="out") == Path(tmp_path / "out")
    with pytest.raises(InputError, match=r"variant='fp16' does not go with this source: .*old format"):
        HookedCausalLM.from_pretrained(tmp_path / "out", variant="fp16")


def test_a_file_that_is_damaged(tmp_path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"ckpt.pt: cannot be read .*git-lfs pointer"):
        HookedCausalLM.from_pretrained(tmp_path)
