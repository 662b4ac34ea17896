import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens import patching
from hooklens.errors import CheckpointError
from hooklens.patching import LogitDiff, SweepResult
from tests.model.networks import make_model, random_tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 4), random_tokens(2, 4, seed=9)
    result = patching.sweep(model, clean, corrupted, "resid_pre", LogitDiff(3, 5), progress=False)
    path = tmp_path_factory.mktemp("results") / "sweep.safetensors"
    result.save(path)
    return path, result


def same(one, other):
    return torch.equal(one.per_pair, other.per_pair) and (one.axes, one.cells, one.stats, one.metric) == (
        other.axes,
        other.cells,
        other.stats,
        other.metric,
    )


def test_truncated_and_flipped_files_are_refused_or_the_same(saved, tmp_path):
    """Damaged files raised `KeyError`, `TypeError` and errors of JSON, or loaded with other labels.

    Flips of the tensors' own bytes are other numbers, which no format without a checksum of data can tell.
    """
    path, result = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    damaged = [whole[:cut] for cut in draw.sample(range(len(whole)), 60)]
    for _ in range(200):
        at = draw.randrange(header)
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
    for number, contents in enumerate(damaged):
        broken = tmp_path / str(number)
        broken.write_bytes(contents)
        refusal = None
        try:
            loaded = SweepResult.load(broken)
        except CheckpointError as error:
            refusal = str(error)
        assert str(broken) in refusal if refusal is not None else same(loaded, result)


WRONG = (None, 3, -1.5, "text", [], {}, [[]], {"a": 1}, True, [None, 3])


@pytest.mark.parametrize("key", ["axes", "cells", "metric", "direction", "stats", "missing"])
def test_any_value_of_any_key_names_the_key(saved, tmp_path, key):
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata["digest"]
    described = json.loads(metadata["description"])

    def load(changed):
        save_file(tensors, tmp_path / "file", metadata={**metadata, "description": json.dumps(changed)})
        return SweepResult.load(tmp_path / "file")

    assert load(described).metric == "LogitDiff"
    if key == "missing":
        for name in described:
            with pytest.raises(CheckpointError, match=f"key '{name}' is missing"):
                load({other: value for other, value in described.items() if other != name})
        return
    for wrong in WRONG:
        if key == "metric" and isinstance(wrong, str):
            continue
        # No axis at all is well formed, and does not go with the tensor.
        named = "per_pair" if key == "axes" and wrong == [] else key
        with pytest.raises(CheckpointError, match=f"key '{named}'"):
            load({**described, key: wrong})
    if key != "stats":
        return
    for entry in described["stats"]:
        for wrong in ("1", None, True, []):
            with pytest.raises(CheckpointError, match="key 'stats'"):
                load({**described, "stats": {**described["stats"], entry: wrong}})


def test_tensors_of_another_shape_are_refused(saved, tmp_path):
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata["digest"]
    for name, changed, match in (
        ("per_pair", torch.zeros(2, 4, 3), "key 'per_pair' is a tensor"),
        ("per_pair", torch.zeros(2, 4, 2, dtype=torch.long), "key 'per_pair' is a tensor"),
        ("clean", torch.zeros(1), "key 'per_pair' is a tensor"),
        ("corrupted", torch.zeros(3), "key 'corrupted' is a tensor"),
        ("other", torch.zeros(3), "holds the tensors"),
    ):
        save_file({**tensors, name: changed}, tmp_path / "file", metadata=metadata)
        with pytest.raises(CheckpointError, match=match):
            SweepResult.load(tmp_path / "file")


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch):
    _, result = saved
    path = tmp_path / "kept.safetensors"
    result.save(path)
    before = path.read_bytes()

    def fail(*given, **options):
        raise OSError("no space left")

    monkeypatch.setattr("hooklens.files.save_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot write a sweep to .*no space left"):
        result.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["kept.safetensors"]
    with pytest.raises(CheckpointError, match="cannot read a sweep"):
        SweepResult.load(tmp_path / "nowhere")
