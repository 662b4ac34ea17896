"""Tests of hooklens.adapters.files.disk: which file a tensor is read from, and headers checked by their digest."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.adapters.files import disk
from hooklens.adapters.files.disk import DiskTensors
from hooklens.errors import CheckpointError
from tests.checkpoints import build_variant, load_apart, save_variant


@pytest.fixture
def sharded(tmp_path):
    return save_variant("llama-gqa", tmp_path, max_shard_size="60KB")


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def add(path, **tensors) -> None:
    save_file({**load_apart(path), **tensors}, path, metadata={"format": "pt"})


def test_the_index_says_where_a_tensor_is(sharded) -> None:
    """A stale tensor in a shard that came later won over the index, silently."""
    weight_map = read_index(sharded)["weight_map"]
    shards = sorted(set(weight_map.values()))
    expected = dict(build_variant("llama-gqa").state_dict())
    for shard in shards:
        foreign = {name: torch.full_like(expected[name], 7.0) for name, file in weight_map.items() if file != shard}
        add(sharded / shard, **foreign)
    found = DiskTensors(sharded)
    assert set(found.names()) == set(weight_map)
    assert all(torch.equal(found.read(name), expected[name]) for name in weight_map)


def test_a_tensor_is_in_the_file_that_the_index_says(sharded) -> None:
    index = read_index(sharded)
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"index lists tensors that the files do not hold: '{name}' in {last}"):
        DiskTensors(sharded)


def test_tensors_beside_the_index(sharded) -> None:
    """One that is there once is accounted for as any other; of two nobody knows which is meant."""
    first, *_, last = sorted(set(read_index(sharded)["weight_map"].values()))
    add(sharded / first, extra=torch.ones(1))
    with pytest.raises(CheckpointError, match="unexpected tensors: 'extra'"):
        HookedCausalLM.from_pretrained(sharded)
    add(sharded / last, extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match=rf"are in several files: 'extra' in {first} and {last}"):
        HookedCausalLM.from_pretrained(sharded)


def test_headers_that_hooklens_wrote_are_checked(tmp_path) -> None:
    HookedCausalLM.from_hf(build_variant("llama-gqa")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"format", "hooklens.header"}
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"layers.0.input_layernorm", b"layers.0.input_layernorn", 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header is damaged: names, dtypes or shapes"):
        HookedCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_tensors_of_other_dtypes_are_refused(tmp_path, dtype) -> None:
    """int8 and float8 weights were taken as they stand, without the scales that belong to them."""
    save_variant("llama-gqa", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    add(tmp_path / "model.safetensors", **{name: torch.ones(48, 32).to(dtype)})
    said = rf"another dtype than float64, .*: '{name}' is {str(dtype).removeprefix('torch.')} \(.*dequantise"
    with pytest.raises(CheckpointError, match=said):
        HookedCausalLM.from_pretrained(tmp_path)


# Whole files in one mapping, and parts of one that start anywhere in a page: an odd size comes before each.
LYING_ANYWHERE = {
    "large": torch.randn(300, 401),
    "float64": torch.randn(3, 5, dtype=torch.float64),
    "bfloat16": torch.randn(7, 3).bfloat16(),
    "float16": torch.randn(1001).half(),
    "one number": torch.tensor(2.5),
    "integers": torch.arange(11),
    "flags": torch.tensor([True, False, True]),
    "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "no entries": torch.zeros(0, 4),
    "large again": torch.randn(5000),
}


@pytest.mark.parametrize("name", LYING_ANYWHERE)
def test_a_tensor_read_apart_is_the_same(name, tmp_path) -> None:
    save_file(LYING_ANYWHERE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = DiskTensors(tmp_path)
    expected, apart = LYING_ANYWHERE[name], source.read(name, apart=True)
    assert (apart.dtype, apart.shape) == (expected.dtype, expected.shape)
    assert torch.equal(apart.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    if apart.numel():
        # What is written to it reaches neither the file nor who reads it again.
        apart.zero_()
        assert torch.equal(source.read(name).float(), expected.float())
        assert torch.equal(source.read(name, apart=True).float(), expected.float())


def test_entries_at_an_odd_place_are_read_apart(tmp_path) -> None:
    """Where a number would lie across words, safetensors copies."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(4)}, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    b = raw[8 + size :][slice(*header["b"]["data_offsets"])]
    a = raw[8 + size :][slice(*header["a"]["data_offsets"])]
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [0, 3], [3, 19]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + a + b)
    assert torch.equal(DiskTensors(tmp_path).read("b", apart=True), torch.frombuffer(bytearray(b), dtype=torch.float32))


def test_reading_apart_reads_the_header_once(tmp_path, monkeypatch) -> None:
    """A file was opened once more for each expert, and its header read as often."""
    tensors = {f"experts.{n}": torch.randn(4, 4) for n in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    source, n_read = DiskTensors(tmp_path), 0
    locate = disk._locate_entries

    def count(path):
        nonlocal n_read
        n_read += 1
        return locate(path)

    monkeypatch.setattr(disk, "_locate_entries", count)
    monkeypatch.setattr(disk, "safe_open", None)
    assert all(torch.equal(source.read(name, apart=True), tensor) for name, tensor in tensors.items())
    assert n_read == 1
