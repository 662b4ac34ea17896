import json
import pickle
import socket
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hooklens.adapters import open_checkpoint
from hooklens.errors import CheckpointError, HookLensError, UnsupportedModelError
from tests.checkpoints import build_variant, edit_config, save_variant


def assert_same_tensors(checkpoint, expected) -> None:
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def whole(tmp_path):
    """A checkpoint in one file, and its tensors."""
    folder = save_variant("neox-parallel", tmp_path / "whole")
    return folder, dict(open_checkpoint(folder).tensors())


@pytest.fixture
def sharded(tmp_path):
    return save_variant("neox-parallel", tmp_path / "sharded", max_shard_size="30KB")


def save_as_pickle(folder, **options):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", **options)
    return weights


def test_shards(whole, sharded) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert_same_tensors(open_checkpoint(sharded), whole[1])


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickles_of_both_formats(whole, zip_format) -> None:
    folder, expected = whole
    save_as_pickle(folder, _use_new_zipfile_serialization=zip_format)
    assert_same_tensors(open_checkpoint(folder), expected)


def test_sharded_pickles(whole) -> None:
    folder, expected = whole
    weights = save_as_pickle(folder)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, name in enumerate(weights):
        weight_map[name] = f"pytorch_model-{number % 3}.bin"
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name, where in weight_map.items() if where == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_tensors(open_checkpoint(folder), expected)


def test_a_local_folder_touches_no_network(whole, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert_same_tensors(open_checkpoint(str(whole[0])), whole[1])


def test_tensors_are_let_go_one_by_one(whole) -> None:
    alive, most = weakref.WeakSet(), 0
    for _, tensor in open_checkpoint(whole[0]).tensors():
        alive.add(tensor)
        most = max(most, len(alive))
        del tensor
    # One rule's tensors: query, key and value of a fused one, and the one before.
    assert most <= 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped where")
def test_unfused_tensors_are_views_of_the_mapped_file(tmp_path) -> None:
    checkpoint = open_checkpoint(save_variant("llama-tied", tmp_path))
    tensors = dict(checkpoint.tensors())
    assert tensors["embed.W_E"].data_ptr() == tensors["unembed.W_U"].data_ptr()
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("model.safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            mapped.append(range(start, end))
    for name in ("embed.W_E", "blocks.0.attn.W_Q", "blocks.1.mlp.W_out"):
        assert any(tensors[name].data_ptr() in addresses for addresses in mapped), name


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": "torch.float64"}, torch.float64),
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_dtype_is_the_configs_or_else_the_tensors(change, dtype, tmp_path) -> None:
    edit_config(save_variant("llama-gqa", tmp_path, dtype=torch.bfloat16), **change)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in checkpoint.tensors())


def test_an_unknown_dtype_is_refused(whole) -> None:
    with pytest.raises(UnsupportedModelError, match="gives dtype 'int8'; expected a floating-point torch dtype"):
        open_checkpoint(edit_config(whole[0], dtype="int8"))


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-tied", "falcon-40b"])
def test_tensors_are_read_one_by_one_by_name(tmp_path, variant) -> None:
    checkpoint = open_checkpoint(save_variant(variant, tmp_path))
    tensors = dict(checkpoint.tensors())
    assert set(tensors) == set(checkpoint.cfg.description.weights)
    for name in reversed(tensors):
        assert torch.equal(checkpoint.read(name), tensors[name]), name
    with pytest.raises(KeyError, match=r"blocks\.0\.nothing"):
        checkpoint.read("blocks.0.nothing")


def test_layers_are_checked_before_the_first_tensor(whole) -> None:
    with pytest.raises(HookLensError, match=r"layers=\[9\]"):
        open_checkpoint(whole[0]).tensors([9])


class TestDamage:
    def test_truncated_safetensors(self, whole) -> None:
        path = whole[0] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read .* download it again"):
            open_checkpoint(whole[0])

    def test_empty_safetensors(self, whole) -> None:
        (whole[0] / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
            open_checkpoint(whole[0])

    @pytest.mark.parametrize("keep", [0, 10, 5000, -100])
    @pytest.mark.parametrize("zip_format", [True, False])
    def test_truncated_pickle(self, whole, keep, zip_format) -> None:
        save_as_pickle(whole[0], _use_new_zipfile_serialization=zip_format)
        path = whole[0] / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: .*again"):
            open_checkpoint(whole[0])

    def test_missing_shards_are_all_named(self, sharded) -> None:
        first, second, *rest = sorted(sharded.glob("model-*.safetensors"))
        first.unlink()
        second.unlink()
        with pytest.raises(
            CheckpointError, match=f"2 of {len(rest) + 2} weight files are missing: '{first.name}', '{second.name}'"
        ):
            open_checkpoint(sharded)

    def test_an_index_that_promises_too_much(self, sharded) -> None:
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["ghost.weight"] = next(iter(content["weight_map"].values()))
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"index lists tensors that the files do not hold: 'ghost.weight'"):
            open_checkpoint(sharded)

    def test_an_index_without_a_map(self, sharded) -> None:
        (sharded / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(CheckpointError, match="'weight_map' is None, expected an object from"):
            open_checkpoint(sharded)

    def test_no_weights(self, whole) -> None:
        (whole[0] / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"holds no weights; expected model.safetensors, .*'config.json'"):
            open_checkpoint(whole[0])

    def test_no_config(self, whole) -> None:
        (whole[0] / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"holds no config.json"):
            open_checkpoint(whole[0])

    @pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")])
    def test_config_that_is_not_json(self, whole, text, said) -> None:
        (whole[0] / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(whole[0])


class Bomb:
    """Sets a mark when it is unpickled."""

    exploded = False

    def __reduce__(self):
        return (_explode, ())


def _explode() -> None:
    Bomb.exploded = True


def test_a_pickle_with_code_is_refused_and_not_run(whole) -> None:
    weights = save_as_pickle(whole[0])
    torch.save({**weights, "bomb": Bomb()}, whole[0] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refused: .*Unsupported global.*never runs code") as caught:
        open_checkpoint(whole[0])
    assert "weights_only" not in str(caught.value)
    assert not Bomb.exploded
    with pytest.raises(pickle.UnpicklingError):
        torch.load(whole[0] / "pytorch_model.bin", weights_only=True)


def test_a_pickle_of_something_else_is_refused(whole) -> None:
    save_as_pickle(whole[0])
    torch.save({"state_dict": {"a": torch.zeros(1)}}, whole[0] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a mapping from names to tensors, found dict"):
        open_checkpoint(whole[0])


def test_checkpoints_quantised_in_an_unknown_way_are_refused(whole) -> None:
    edit_config(whole[0], quantization_config={"quant_method": "aqlm", "bits": 2})
    with pytest.raises(UnsupportedModelError, match=r"quantization_config is .*aqlm"):
        open_checkpoint(whole[0])


def test_unknown_config_keys_give_one_warning(whole) -> None:
    edit_config(whole[0], logit_twist=2.0)
    with pytest.warns(UserWarning, match="'logit_twist'") as caught:
        list(open_checkpoint(whole[0]).tensors())
    assert len(caught) == 1


def test_safetensors_are_preferred(whole) -> None:
    torch.save(build_variant("llama-gqa").state_dict(), whole[0] / "pytorch_model.bin")
    assert_same_tensors(open_checkpoint(whole[0]), whole[1])
