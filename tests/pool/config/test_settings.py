"""Tests of hooklens.pool.config.settings and hooklens.pool.config.dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hooklens.errors import InputError
from hooklens.pool import PoolError
from hooklens.pool.config.document import Document, read_yaml
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.config.settings import copy_settings, is_special, list_objects, read_document


def refusal_of(content: Any) -> str:
    with pytest.raises(PoolError) as caught:
        read_document(Document(content, "config"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("models", "config: is 'models', expected a mapping with the key 'models'"),
        ([], "config: is [], expected a mapping"),
        ({}, "config: has no key 'models'"),
        ({"models": None}, "config: models is None, expected a mapping from names, or a list"),
        ({"models": {1: "x"}}, "config: models.1: its name is 1, expected a text that is not empty; put quotes"),
        ({"models": {"": "x"}}, "its name is ''"),
        (
            {"models": {"a": 3}},
            "config: models.a is 3, expected a path or hub name, a mapping of arguments, or a model",
        ),
        ({"models": {"a": ""}}, "config: models.a is '', expected a path or hub name"),
        ({"models": {"a": "???"}}, "config: models.a is '???', which is to be filled in"),
        ({"models": {"a": {}}}, "config: models.a: has no path; expected pretrained_model_name_or_path"),
        (
            {"models": {"a": {"source": "x", "pretrained_model_name_or_path": "x"}}},
            "models.a: has pretrained_model_name",
        ),
        ({"models": {"a": {"source": 3}}}, "models.a.source is 3, expected a path or hub name"),
        ({"models": {"a": {"source": "x", 3: "y"}}}, "models.a.3: the name of an argument is 3"),
        ({"models": {"a": {"source": "x", "torch_dtype": "int8"}}}, "models.a.torch_dtype is 'int8', expected a float"),
        ({"models": {"a": {"source": "x", "_args_": [1]}}}, "models.a._args_ is Hydra's"),
        ({"models": {"a": {"_target_": "transformers.AutoTokenizer"}}}, "which loads no model"),
        (
            {"models": {"a": {"_target_": "hooklens.pool.load_peft_causal_lm", "base_model_path": "x"}}},
            "peft_model_path",
        ),
        ({"models": [], "tokenizer": 3}, "config: tokenizer is 3, expected a path or hub name, a mapping of arguments"),
        ({"models": [], "tokenizer": {}}, "tokenizer.pretrained_model_name_or_path is None"),
        ({"models": [], "tokenizer": {"_target_": "hooklens.HookedCausalLM"}}, "which loads no tokenizer"),
        ({"models": [], "model_kwargs": "bf16"}, "config: model_kwargs is 'bf16', expected a mapping of arguments"),
        ({"models": [], "model_kwargs": {"dtype": "f16"}}, "model_kwargs.dtype is 'f16'"),
        ({"models": [], "enable_lazy_loading": "no"}, "enable_lazy_loading is 'no', expected true or false"),
        (
            {"models": [], "model_kwarg": {}},
            "config: model_kwarg is no key of a pool, and nothing refers to it. Did you",
        ),
        ({"models": [], "_target_": "hooklens.HookedCausalLM"}, "expected a pool of causal language models"),
    ],
)
def test_what_is_refused(content: Any, found: str) -> None:
    assert found in refusal_of(content)


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text("models:\n  a: 3\n  b:\n    _target_: os.system\n    command: ls\ntokeniser: x\n")
    with pytest.raises(PoolError) as caught:
        read_document(read_yaml(path))
    for found in (f"{path}:2: models.a is 3", f"{path}:4: models.b._target_ is 'os.system'", f"{path}:6: tokeniser is"):
        assert found in str(caught.value)
    assert "Did you mean 'tokenizer'" in str(caught.value)


def test_keys_that_only_references_need_may_stand_beside() -> None:
    content = {"base": "owner/x", "models": {"a": "${..base}"}, "tokenizer": "${.base}"}
    settings = read_document(Document(content, "config"))
    assert settings.models == {"a": "owner/x"}
    assert settings.as_config() == {"models": {"a": "owner/x"}, "tokenizer": "owner/x"}
    assert "unused is no key" in refusal_of({**content, "unused": 1})


def test_a_pool_inside_a_larger_configuration() -> None:
    content = {
        "method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        "base": "owner/x",
        "modelpool": {"models": {"a": "${base}"}, "own": "y", "tokenizer": "${.own}"},
    }
    settings = read_document(Document(content, "config"))
    assert (settings.models, settings.tokenizer) == ({"a": "owner/x"}, "y")


def test_data_sets_and_notes_are_kept_and_not_looked_up() -> None:
    others = {
        "_recursive_": False,
        "_usage_": "note",
        "_version_": "0.2.33",
        "train_datasets": {"x": {"_target_": "os.system"}},
        "test_datasets": {"y": {"_target_": "fusion_bench.dataset.llama.alpaca.load_tokenized_alpaca_dataset"}},
    }
    settings = read_document(Document({"models": [], **others}, "config"))
    assert settings.others == others


def test_dtypes_stand_by_name_in_a_configuration() -> None:
    content = {
        "models": {"a": {"source": "x", "dtype": torch.float16}},
        "model_kwargs": {"torch_dtype": torch.bfloat16},
    }
    settings = read_document(Document(content, "config"))
    assert settings.as_config() == {
        "models": {"a": {"source": "x", "dtype": "float16"}},
        "model_kwargs": {"torch_dtype": "bfloat16"},
    }
    assert settings.model_kwargs["torch_dtype"] is torch.bfloat16
    copied = copy_settings(settings)
    copied.models["a"]["source"] = "y"
    assert settings.models["a"]["source"] == "x"


def test_objects_are_named() -> None:
    config = {"models": {"a": torch.nn.Linear(1, 1), "b": ["x", torch.device("cpu")]}, "n": 1}
    assert list(list_objects(config)) == ["models.a (Linear)", "models.b.1 (device)"]


@pytest.mark.parametrize(
    ("name", "special"),
    [("_pretrained_", True), ("_merged_", True), ("_", True), ("_a", False), ("a_", False), ("a", False)],
)
def test_special_names(name: str, special: bool) -> None:
    assert is_special(name) == special


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        *((name, torch.float16) for name in ("fp16", "float16", "half", "torch.float16")),
        *((name, torch.bfloat16) for name in ("bf16", "bfloat16")),
        *((name, torch.float32) for name in ("float", "fp32", "float32")),
        *((name, torch.float64) for name in ("double", "fp64", "float64")),
        (torch.bfloat16, torch.bfloat16),
        ("auto", "auto"),
        (None, None),
    ],
)
def test_spellings_of_dtypes(given: Any, dtype: Any) -> None:
    assert read_pool_dtype(given, what="dtype") == dtype


@pytest.mark.parametrize("given", ["fp8", "int8", torch.int8, 16, "", "BF16"])
def test_what_is_no_dtype(given: Any) -> None:
    with pytest.raises(InputError, match="or one of fp16, bf16, fp32, fp64, auto, or None"):
        read_pool_dtype(given, what="dtype")
