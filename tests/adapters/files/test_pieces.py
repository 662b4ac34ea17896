"""Files written in pieces, read back with safetensors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hooklens.adapters.files.disk import DiskTensors, header_of
from hooklens.adapters.files.pieces import open_pieces
from hooklens.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_whatever_is_written_is_read_by_safetensors(tmp_path_factory, outlines, n_piece):
    """Tensors of any dtype, empty ones too, in pieces of any size, in another order than they lie in the file."""
    path = tmp_path_factory.mktemp("pieces") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = {
        f"t{i}": torch.randint(0, 200, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(outlines)
    }
    with open_pieces(path, {name: header_of(tensor) for name, tensor in state.items()}) as file:
        for name in reversed(state):
            file.write(name, state[name].flatten().split(n_piece))
    found = load_file(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


def test_it_is_laid_out_as_safetensors_does(tmp_path: Path):
    """Byte for byte but for the order of the metadata's keys: aligned, the widest dtypes first, no gaps."""
    state = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(5.0), "c": torch.zeros(2, dtype=torch.float64)}
    with open_pieces(tmp_path / "ours.safetensors", {name: header_of(one) for name, one in state.items()}) as file:
        for name, tensor in state.items():
            file.write(name, [tensor])
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    save_file(state, tmp_path / "theirs.safetensors", metadata=metadata)
    ours, theirs = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert len(ours) == len(theirs)
    start = 8 + int.from_bytes(ours[:8], "little")
    assert start % 8 == 0
    assert ours[start:] == theirs[start:]


def test_a_changed_header_is_found(tmp_path: Path):
    """As in the files that save_pretrained writes."""
    path = tmp_path / "model.safetensors"
    with open_pieces(path, {"weight": header_of(torch.ones(2, 3))}) as file:
        file.write("weight", [torch.ones(6)])
    assert torch.equal(DiskTensors(tmp_path).read("weight"), torch.ones(2, 3))
    path.write_bytes(path.read_bytes().replace(b"[2,3]", b"[3,2]"))
    with pytest.raises(CheckpointError, match="its header is damaged"):
        DiskTensors(tmp_path)


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path):
    headers = {"weight": header_of(torch.ones(2, dtype=torch.complex64))}
    with pytest.raises(CheckpointError, match="'weight' is complex64"), open_pieces(tmp_path / "file", headers):
        pass
