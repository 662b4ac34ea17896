"""Files of a checkpoint folder, damaged in every way: refused with the file's name, or what was saved is loaded."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.errors import CheckpointError, HookLensError
from tests.checkpoints import build_variant, edit_config, save_variant
from tests.tokens.tokenizers import ALL_SPECIAL, word_tokenizer

pytestmark = [
    # A key that damage has renamed is unknown, which is what the warnings say.
    pytest.mark.filterwarnings("ignore"),
]

# A value of every kind that JSON has, and of every size.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**5, 10**12, 10**400, 0.5, -2.5, 1e300, float("nan"), float("inf"), "", "text",
    "1", [], [1], ["text"], [[]], {}, {"a": 1}, {"type": 5}, {"rope_type": "yarn"},
]  # fmt: skip
# Older spellings and keys that the checkpoints here do not have.
MORE_KEYS = (
    "alibi", "compression_config", "ffn_hidden_size", "multi_query", "n_embed", "original_max_position_embeddings",
    "pruned_heads", "quantization", "quantization_config", "rope_interleaved", "rope_scaling", "rope_theta",
    "rotary_pct", "torch_dtype",
)  # fmt: skip


def opens(folder: Path, *names: str) -> bool:
    """Whether a folder opens; if not, the error is one of ours and names what it should."""
    try:
        open_checkpoint(folder)
    except HookLensError as error:
        said = str(error)
    else:
        return True
    assert all(name in said for name in names), said
    return False


FAMILIES = ["llama-yarn", "neox-parallel", "falcon-40b"]


@pytest.mark.parametrize("variant", FAMILIES)
class TestConfig:
    # Most keys are of every family, so by default each tries them with a third of the values.
    @pytest.mark.parametrize("one_in", [3, pytest.param(1, marks=pytest.mark.slow)])
    def test_any_value_under_any_key(self, tmp_path, variant, one_in) -> None:
        """`architectures` of numbers, a `model_type` that is a list, infinite sizes: each raised what Python raises."""
        config = json.loads((save_variant(variant, tmp_path) / "config.json").read_text())
        opened, values = 0, VALUES[FAMILIES.index(variant) % one_in :: one_in]
        for key in (*config, *MORE_KEYS):
            for value in values:
                (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
                opened += opens(tmp_path, "config.json")
        assert 100 / one_in < opened < len(values) * len(config)

    @pytest.mark.parametrize("one_in", [9, pytest.param(3, marks=pytest.mark.slow)])
    def test_any_value_in_the_description_of_rotary_positions(self, tmp_path, variant, one_in) -> None:
        config = json.loads((save_variant(variant, tmp_path) / "config.json").read_text())
        scaling = {"rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        keys = (*scaling, "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings", "beta_fast")
        for kind in ("default", "linear", "dynamic", "llama3", "yarn"):
            for key in keys:
                for value in VALUES[1 + 3 * FAMILIES.index(variant) % one_in :: one_in]:
                    rope = {**scaling, "rope_type": kind, "original_max_position_embeddings": 16, key: value}
                    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
                    opens(tmp_path, "config.json")

    def test_no_number_of_layers_takes_time(self, tmp_path, variant) -> None:
        """100,000 layers took minutes: the description of each was made before a tensor was looked for."""
        save_variant(variant, tmp_path)
        for number in (10**5, 2**31 - 1):
            edit_config(tmp_path, num_hidden_layers=number)
            with pytest.raises(
                CheckpointError, match=rf"config\.json describes {number} layers, and there are \d+ tensors"
            ):
                open_checkpoint(tmp_path)

    def test_sizes_that_no_file_can_hold(self, tmp_path, variant) -> None:
        edit_config(save_variant(variant, tmp_path), vocab_size=2**31 - 1, hidden_size=2**30, num_attention_heads=2**20)
        with pytest.raises(CheckpointError, match=r"weights of impossible size: embed\.W_E \[2147483647, 1073741824\]"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("depth", [300, 900, 990, 5000])
def test_deep_nesting(tmp_path, depth) -> None:
    config = (save_variant("llama-gqa", tmp_path) / "config.json").read_text()
    for key, value in (("architectures", "[" * depth + "]" * depth), ("x", '{"a":' * depth + "1" + "}" * depth)):
        (tmp_path / "config.json").write_text(f'{config.rstrip()[:-1]}, "{key}": {value}}}')
        opens(tmp_path, "config.json")


class Saved:
    """A folder that HookLens saved, and what loading it must give."""

    def __init__(self, folder: Path, max_shard_size: str) -> None:
        tokenizer = word_tokenizer(template="<s> $A", **ALL_SPECIAL)
        self.model = HookedCausalLM.from_hf(build_variant("llama-gqa"), tokenizer).process_weights(fold_ln=True)
        self.model.generation_config = {"eos_token_id": [1, 2], "pad_token_id": 0}
        self.model.save_pretrained(folder, max_shard_size=max_shard_size)
        self.folder = folder

    def loads(self, *, same: bool) -> bool:
        """Whether it loads; with `same`, what loads must be what was saved. No error but ours."""
        try:
            found = HookedCausalLM.from_pretrained(self.folder)
        except HookLensError:
            return False
        if same:
            assert found.transforms == self.model.transforms
            weights = found.state_dict()
            assert all(torch.equal(weights[name], weight) for name, weight in self.model.state_dict().items())
        return True


@pytest.fixture
def whole(tmp_path) -> Saved:
    return Saved(tmp_path, "1GB")


@pytest.fixture
def sharded(tmp_path) -> Saved:
    return Saved(tmp_path, "60KB")


def damage(data: bytes, *, up_to: int | None = None, n: int = 60) -> Iterator[bytes]:
    """The data cut off, and with some bits of its beginning flipped."""
    generator = random.Random(0)
    yield b""
    for _ in range(n // 4):
        yield data[: generator.randrange(len(data))]
    for number in range(n):
        changed = bytearray(data)
        for _ in range(1 if number % 3 else 4):
            changed[generator.randrange(up_to or len(data))] ^= 1 << generator.randrange(8)
        if changed != data:
            yield bytes(changed)


def header_size(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def test_a_damaged_header_never_loads_as_something_else(whole) -> None:
    """A flipped bit in a dtype or a name gave other weights."""
    path = whole.folder / "model.safetensors"
    data = path.read_bytes()
    loaded = []
    for changed in damage(data, up_to=header_size(data), n=200):
        path.write_bytes(changed)
        loaded.append(whole.loads(same=True))
    assert not all(loaded)
    path.write_bytes(data)
    assert whole.loads(same=True)


def test_a_damaged_index_never_loads_as_something_else(sharded) -> None:
    path = sharded.folder / "model.safetensors.index.json"
    for changed in damage(path.read_bytes(), n=120):
        path.write_bytes(changed)
        sharded.loads(same=True)


def test_a_weight_map_of_any_shape(sharded) -> None:
    path = sharded.folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first = next(iter(weight_map))
    for value in (*VALUES, "../x", "/etc/passwd", "..", ".", "a\0b", "x" * 5000):
        for content in (
            value,
            {"weight_map": value},
            *({"weight_map": {**weight_map, key: value}} for key in (first, "x")),
        ):
            path.write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match="index"):
                open_checkpoint(sharded.folder)


@pytest.mark.parametrize("one_in", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hooklens.json"])
def test_damaged_json(whole, name, one_in) -> None:
    path = whole.folder / name
    data = path.read_bytes()
    for changed in damage(data, n=60 // one_in):
        path.write_bytes(changed)
        # A digit of the config or of an end token may be another digit: nothing tells that from what was meant.
        whole.loads(same=name == "hooklens.json")
    for value in VALUES:
        if not isinstance(value, dict):
            path.write_text(json.dumps(value))
            with pytest.raises(CheckpointError, match=rf"{name}: expected a JSON object"):
                HookedCausalLM.from_pretrained(whole.folder)
    for place, key in enumerate(json.loads(data) if name != "config.json" else ()):
        # By default each key with other values: in turns, all of them.
        for value in VALUES[place % one_in :: one_in]:
            path.write_text(json.dumps({**json.loads(data), key: value}))
            whole.loads(same=name == "hooklens.json")


@pytest.mark.parametrize("one_in", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files(whole, name, one_in) -> None:
    """The tokenizers package raised what it likes, and its panics, which are no Exception at all."""
    path = whole.folder / name
    data = path.read_bytes()
    loaded = []
    for changed in damage(data, n=40 // one_in):
        path.write_bytes(changed)
        loaded.append(whole.loads(same=True))
    for place, key in enumerate(json.loads(data)):
        for value in VALUES[3 * (place % one_in) :: 3 * one_in]:
            path.write_text(json.dumps({**json.loads(data), key: value}))
            loaded.append(whole.loads(same=True))
    assert not all(loaded)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as JSON"):
        HookedCausalLM.from_pretrained(whole.folder)
    if name == "tokenizer.json":
        path.write_text('{"model": {"type": "WordLevel", "vocab": 5}}')
        with pytest.raises(
            CheckpointError, match=r"the tokenizer files .*'tokenizer\.json'.* cannot be read .*tokenizer="
        ):
            HookedCausalLM.from_pretrained(whole.folder)
        assert HookedCausalLM.from_pretrained(whole.folder, tokenizer=word_tokenizer()).tokenizer is not None


@pytest.mark.parametrize("zip_format", [True, False])
def test_damaged_pickles(whole, zip_format) -> None:
    weights = load_file(whole.folder / "model.safetensors")
    (whole.folder / "model.safetensors").unlink()
    path = whole.folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=zip_format)
    for changed in damage(path.read_bytes(), up_to=3000, n=120):
        path.write_bytes(changed)
        opens(whole.folder)


@pytest.mark.parametrize(
    "content",
    [
        5,
        [1],
        {"a": 5},
        {5: torch.ones(1)},
        torch.ones(2),
        {"a": torch.ones(2, device="meta")},
        {"a": torch.eye(2).to_sparse()},
    ],
)
def test_pickles_of_other_things(whole, content) -> None:
    (whole.folder / "model.safetensors").unlink()
    torch.save(content, whole.folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a mapping from names to tensors"):
        open_checkpoint(whole.folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "a git-lfs pointer, .*`git lfs pull`"), ("<!DOCTYPE html><html>", "a web page")]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"])
def test_what_stands_in_the_place_of_a_file(whole, name, content, said) -> None:
    if name == "pytorch_model.bin":
        (whole.folder / "model.safetensors").unlink()
    (whole.folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read .*It is {said}"):
        HookedCausalLM.from_pretrained(whole.folder)
