"""Files of lenses that are not what they should be."""

import json
from pathlib import Path

import pytest
import torch

from hooklens.analysis.lens.fitted.storage import FILE, read_lens, write_lens
from hooklens.analysis.lens.origin import Origin
from hooklens.errors import CheckpointError
from hooklens.files import write_safetensors
from tests.model.networks import make_model

SHAPES = {"weight": (-1, -2, -2), "bias": (-1, -2)}


def tensors():
    return {"weight": torch.zeros(2, 3, 3), "bias": torch.ones(2, 3)}


@pytest.fixture
def origin():
    return Origin.of(make_model("rotary"))


def test_back_and_forth(origin, tmp_path):
    write_lens(tmp_path / "new", "Kind", tensors(), origin, {"n": 3})
    found, again, about = read_lens(tmp_path / "new", "Kind", SHAPES)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert again == origin
    assert about["n"] == 3
    assert torch.equal(read_lens(tmp_path / "new" / FILE, "Kind", SHAPES)[0]["bias"], found["bias"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight": torch.zeros(2, 3, 4)}, r"'weight' is a tensor \[2, 3, 4\].*expected \[2, 3, 3\] of floating"),
        ({"bias": torch.zeros(1, 3)}, r"'bias' is a tensor \[1, 3\].*expected \[2, 3\]"),
        ({"bias": torch.zeros(2, 3, dtype=torch.int64)}, r"of torch.int64, expected \[2, 3\] of floating numbers"),
        ({"more": torch.zeros(1)}, r"holds the tensors \['bias', 'more', 'weight'\], expected \['bias', 'weight'\]"),
    ],
)
def test_tensors_that_do_not_fit(origin, tmp_path, changes, text):
    write_lens(tmp_path, "Kind", {**tensors(), **changes}, origin, {})
    with pytest.raises(CheckpointError, match=f"is damaged: .*{text}"):
        read_lens(tmp_path, "Kind", SHAPES)


def test_files_of_something_else(origin, tmp_path):
    write_safetensors(tmp_path / FILE, tensors(), {"format": "sweep"})
    with pytest.raises(CheckpointError, match=r"does not hold a lens; expected a file that Kind.save wrote"):
        read_lens(tmp_path, "Kind", SHAPES)
    about = json.dumps({"kind": "Kind"})
    write_safetensors(tmp_path / FILE, tensors(), {"format": "hooklens lens", "lens": about})
    with pytest.raises(CheckpointError, match="does not say which model it was fitted on"):
        read_lens(tmp_path, "Kind", SHAPES)
    described = {"kind": "Kind", "model": {**origin.describe(), "dtype": "float31"}}
    write_safetensors(
        tmp_path / FILE,
        {**tensors(), "sample of the model": origin.sample},
        {"format": "hooklens lens", "lens": json.dumps(described)},
    )
    with pytest.raises(CheckpointError, match="what it says of the model it was fitted on is"):
        read_lens(tmp_path, "Kind", SHAPES)


def test_a_place_that_takes_no_folder(origin, tmp_path):
    Path(tmp_path, "file").touch()
    with pytest.raises(CheckpointError, match="cannot write a lens to"):
        write_lens(tmp_path / "file", "Kind", tensors(), origin, {})
