"""Tests of hooklens.pool.saving, through `save_model`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hooklens import HookedCausalLM, HookLensError
from hooklens.pool import CausalLMPool, PoolError

TOKENS = torch.arange(6)[None]
SOURCE = "bundled:tiny-llama"


@pytest.fixture
def pool() -> CausalLMPool:
    return CausalLMPool({"_pretrained_": SOURCE, "a": SOURCE, "_merged_": "x/y"}, tokenizer=SOURCE)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("word", ["dtype", "model_dtype"])
def test_the_model_stays_as_it_is(pool: CausalLMPool, tmp_path: Path, hooked: bool, word: str) -> None:
    """FusionBench cast the caller's model in place."""
    model = pool.load_model("a", hooked=hooked, dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = None if hooked else model.config.to_dict()
    pool.save_model(model, tmp_path / "saved", **{word: "bf16"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert hooked or model.config.to_dict() == config
    saved = load(tmp_path / "saved")
    assert saved.dtype == torch.bfloat16
    expected = pool.load_model("a", hooked=False, dtype="bfloat16")
    assert torch.equal(saved(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("hooked", [True, False])
def test_tokenizers_are_written(pool: CausalLMPool, tmp_path: Path, hooked: bool) -> None:
    model = pool.load_model("a", hooked=hooked)
    pool.save_model(model, tmp_path / "a")
    # A hooked model has its own tokenizer with it.
    assert (tmp_path / "a" / "tokenizer.json").exists() == hooked
    model.tokenizer = None
    pool.save_model(model, tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    pool.save_model(model, tmp_path / "c", save_tokenizer=True, tokenizer_kwargs={"padding_side": "left"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert tokenizer.padding_side == "left"
    pool.save_model(model, tmp_path / "d", tokenizer=tokenizer)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "d")("the store")["input_ids"] == tokenizer("the store")["input_ids"]
    )
    assert model.tokenizer is None
    assert torch.equal(load(tmp_path / "d")(TOKENS).logits, load(tmp_path / "a")(TOKENS).logits)


@pytest.mark.parametrize("hooked", [True, False])
def test_an_older_checkpoint_in_the_folder_goes(pool: CausalLMPool, tmp_path: Path, hooked: bool) -> None:
    model = pool.load_model("a", hooked=hooked)
    pool.save_model(model, tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("kept")
    pool.save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]
    assert (tmp_path / "notes.txt").exists()


def test_the_home_folder(pool: CausalLMPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pool.save_model(pool.load_model("a"), "~/saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")


def test_a_model_card(pool: CausalLMPool, tmp_path: Path) -> None:
    algorithm = {"_target_": "TaskArithmetic", "scaling_factor": 0.3, "dtype": torch.float32}
    pool.save_model(pool.load_model("a"), tmp_path / "merged", algorithm_config=algorithm, description="A merge.")
    text = (tmp_path / "merged" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "tags": ["merge", "hooklens"],
        "base_model": [SOURCE],
    }
    assert "# merged\n\nA merge.\n" in body
    first, second = (yaml.safe_load(part.split("```")[0]) for part in body.split("```yaml\n")[1:])
    assert first == {**algorithm, "dtype": "torch.float32"}
    assert second == pool.config
    memory = CausalLMPool({"_pretrained_": "owner/base", "a": pool.load_model("a")})
    options: dict[str, Any] = {"algorithm_config": {}, "base_model_in_modelcard": False}
    memory.save_model(memory.load_model("a"), tmp_path / "other", **options)
    head = (tmp_path / "other" / "README.md").read_text().split("---\n")[1]
    assert "owner/base" not in head


class Hub:
    """What was asked of the hub."""

    calls: list[Any]

    def __init__(self, token: Any = None) -> None:
        self.calls.append(("login", token))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: Any) -> None:
        self.calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), commit_message))


def test_uploads_the_folder_when_all_is_in_it(
    pool: CausalLMPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    pool.save_model(
        pool.load_model("a"), tmp_path / "mine", push_to_hub=True, algorithm_config={}, token="t", private=True
    )
    login, repository, upload = Hub.calls
    assert login == ("login", "t")
    assert repository == ("mine", {"private": True, "exist_ok": True})
    assert upload[0] == "me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(upload[1])
    pool.save_model(pool.load_model("a"), tmp_path / "mine", push_to_hub=True, repo_id="named")
    assert Hub.calls[-1][0] == "me/named"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"model": "a"}, "model is 'a', expected a HookedCausalLM or a transformers model"),
        ({"path": ""}, "path is ''"),
        ({"dtype": "bf16", "model_dtype": "fp16"}, "say one thing in two ways"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"repo_id": "x"}, "repo_id: nothing is uploaded"),
        ({"description": "x"}, "written with algorithm_config="),
        ({"tokenizer_kwargs": {}}, "goes with save_tokenizer=True"),
        ({"save_tokenizer": "yes"}, "save_tokenizer is 'yes', expected True or False"),
        ({"tokenizer": "name"}, "tokenizer is 'name', expected a transformers tokenizer"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    pool: CausalLMPool, tmp_path: Path, arguments: dict[str, Any], found: str
) -> None:
    given = {"model": pool.load_model("a"), "path": tmp_path / "saved", **arguments}
    with pytest.raises(PoolError, match=found):
        pool.save_model(given.pop("model"), given.pop("path"), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_pool_without_tokenizer_writes_none(tmp_path: Path) -> None:
    pool = CausalLMPool({"a": SOURCE})
    with pytest.raises(PoolError, match="the pool has no tokenizer"):
        pool.save_model(pool.load_model("a"), tmp_path / "saved", save_tokenizer=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hooked", [True, False])
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    pool: CausalLMPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hooked: bool
) -> None:
    model = pool.load_model("a", hooked=hooked)
    pool.save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer = pool.load_tokenizer()

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(HookLensError, match="disk full"):
        pool.save_model(model, tmp_path, dtype="float16", tokenizer=tokenizer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_saved_merge_is_a_model_of_the_pool(pool: CausalLMPool, tmp_path: Path) -> None:
    model = pool.load_model("a")
    with torch.no_grad():
        model.blocks[0].mlp.W_in.add_(1.0)
    pool.save_model(model, tmp_path / "merged")
    pool.add_model("merged", tmp_path / "merged")
    assert torch.equal(pool.load_model("merged")(TOKENS), model(TOKENS))
    assert isinstance(pool.load_model("merged"), HookedCausalLM)
