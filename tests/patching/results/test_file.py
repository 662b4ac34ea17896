import json
import random
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens import patching
from hooklens.errors import CheckpointError
from hooklens.patching import Circuit, LogitDiff
from hooklens.patching.results.moments import Moments
from tests.model.networks import make_model, random_tokens

METRIC = LogitDiff(3, 5)


def sweep(model, *prompts):
    return patching.sweep(model, *prompts, "resid_pre", METRIC, progress=False)


def edge_scores(model, *prompts):
    return patching.edge_attribution(model, *prompts, METRIC, progress=False)


def edge_sums(model, *prompts):
    return patching.edge_attribution(model, *prompts, METRIC, keep_pairs=False, progress=False)


def attribution(model, *prompts):
    return patching.attribution(model, *prompts, "resid_pre", METRIC, progress=False)


def circuits(model, *prompts):
    listed = [Circuit([("embed", "logits")]), Circuit([("embed", "m0"), ("m0", "logits")])]
    return patching.evaluate_circuits(model, *prompts, listed, METRIC, progress=False)


@pytest.fixture(
    scope="module", params=[sweep, attribution, circuits, edge_scores, edge_sums], ids=lambda kind: kind.__name__
)
def saved(request, tmp_path_factory):
    model = make_model("rotary")
    result = request.param(model, random_tokens(2, 4), random_tokens(2, 4, seed=9))
    path = tmp_path_factory.mktemp("results") / "result.safetensors"
    result.save(path)
    return path, result


def parts(path):
    """The tensors and the metadata of a file, without the digest."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {key: text for key, text in file.metadata().items() if key != "digest"}


def same(one, other):
    def equal(mine, theirs):
        if isinstance(mine, Moments):
            mine, theirs = mine.table, theirs.table
        return torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs

    return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(other) if field.compare)


def test_a_file_holds_the_result(saved):
    path, result = saved
    assert same(type(result).load(path), result)


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
    broken = tmp_path / "broken"
    for contents in damaged:
        broken.write_bytes(contents)
        refusal = None
        try:
            loaded = type(result).load(broken)
        except CheckpointError as error:
            refusal = str(error)
        assert str(broken) in refusal if refusal is not None else same(loaded, result)


WRONG = (None, 3, -1.5, "text", [], {}, [[]], {"a": 1}, True, [None, 3])
FREE = {"metric": str, "ablation": str, "method": str, "rules": str, "forwards": int, "tokens": (int, float)}
"""Keys of which every value of a type is well formed."""


def test_any_value_of_any_key_names_the_key(saved, tmp_path):
    """Each kind of file was checked by a reader of its own.

    Edge scores took a text as a list of its letters, a mapping as a list of its keys, and any value as a method's
    name; a circuit's edge could be a text of two letters.
    """
    path, result = saved
    tensors, metadata = parts(path)
    described = json.loads(metadata["description"])
    file = tmp_path / "file"

    def load(changed):
        save_file(tensors, file, metadata={**metadata, "description": json.dumps(changed)})
        return type(result).load(file)

    assert same(load(described), result)
    for key in described:
        with pytest.raises(CheckpointError, match=f"{file} is damaged: key '{key}' is missing, expected"):
            load({other: value for other, value in described.items() if other != key})
        for wrong in WRONG:
            if isinstance(wrong, FREE.get(key, ())) and not isinstance(wrong, bool):
                continue
            # No labels at all are well formed, and do not go with the rest.
            named = ".*" if wrong == [] else f"key '{key}'"
            with pytest.raises(CheckpointError, match=f"{file} is damaged: {named}"):
                load({**described, key: wrong})
    with pytest.raises(CheckpointError, match="key 'more' is not known"):
        load({**described, "more": 1})
    with pytest.raises(CheckpointError, match=r"key 'metric' is None, expected a text; key '.*' is None, expected"):
        load(dict.fromkeys(described))
    for entry in described.get("stats", ()):
        for wrong in ("1", None, True, []):
            with pytest.raises(CheckpointError, match="key 'stats'"):
                load({**described, "stats": {**described["stats"], entry: wrong}})


def test_tensors_that_are_not_expected_are_refused(saved, tmp_path):
    """The dtypes of edge scores were not looked at."""
    path, result = saved
    tensors, metadata = parts(path)
    file = tmp_path / "file"

    def load(**changed):
        kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(kept, file, metadata=metadata)
        return type(result).load(file)

    assert same(load(), result)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: it holds the tensors \[.*'other'.*, expected \["):
        load(other=torch.zeros(3))
    for name, tensor in tensors.items():
        with pytest.raises(CheckpointError, match="damaged: it holds the tensors"):
            load(**{name: None})
        for wrong in (
            torch.cat([tensor, tensor[:1]]),
            tensor[..., None],
            torch.zeros(()),
            torch.zeros_like(tensor, dtype=torch.long),
            torch.zeros_like(tensor, dtype=torch.float16),
        ):
            # Which of two tensors is of the wrong size cannot be told where nothing else says how many pairs there are.
            with pytest.raises(CheckpointError, match=r"damaged: key '\w+' is a tensor"):
                load(**{name: wrong})


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch):
    _, result = saved
    path = tmp_path / "kept.safetensors"
    result.save(path)
    before = path.read_bytes()

    def fail(*given, **options):
        raise OSError("no space left")

    monkeypatch.setattr("hooklens.files.save_file", fail)
    with pytest.raises(CheckpointError, match=rf"cannot write [\w ']+ to {path}: .*no space left"):
        result.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["kept.safetensors"]
    with pytest.raises(CheckpointError, match=r"cannot read [\w ']+ from .*nowhere"):
        type(result).load(tmp_path / "nowhere")
