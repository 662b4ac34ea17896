"""Tests of hooklens.pool.tokenizer, through `load_tokenizer`."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from hooklens.bundled import bundled_path
from hooklens.errors import InputError
from hooklens.pool import CausalLMPool, PoolError, register_target
from hooklens.pool.config import targets

PATH = str(bundled_path("tiny-llama"))
TEXT = "Mary went to the store"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_registered", {})


def make_pool(tokenizer: Any) -> CausalLMPool:
    return CausalLMPool({}, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "tokenizer",
    [
        PATH,
        "bundled:tiny-llama",
        {"pretrained_model_name_or_path": PATH},
        {"_target_": "transformers.AutoTokenizer", "pretrained_model_name_or_path": PATH, "use_fast": True},
        {"_target_": "transformers.AutoTokenizer.from_pretrained", "pretrained_model_name_or_path": PATH},
        {"_target_": "transformers.PreTrainedTokenizerFast", "pretrained_model_name_or_path": PATH},
    ],
)
def test_every_spelling_gives_the_tokenizer(tokenizer: Any) -> None:
    expected = AutoTokenizer.from_pretrained(PATH)(TEXT)["input_ids"]
    assert make_pool(tokenizer).load_tokenizer()(TEXT)["input_ids"] == expected


def test_the_call_takes_the_place_of_the_mapping() -> None:
    entry = {"_target_": "transformers.AutoTokenizer", "pretrained_model_name_or_path": PATH, "padding_side": "right"}
    pool = make_pool(entry)
    assert pool.load_tokenizer(padding_side="left").padding_side == "left"
    assert pool.load_tokenizer().padding_side == "right"
    assert make_pool(PATH).load_tokenizer(padding_side="left").padding_side == "left"


def test_a_tokenizer_is_itself() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    assert make_pool(tokenizer).load_tokenizer() is tokenizer
    with pytest.raises(InputError, match="which takes no arguments: padding_side"):
        make_pool(tokenizer).load_tokenizer(padding_side="left")


def test_registered_functions_make_tokenizers() -> None:
    register_target("mine.tokenizer", AutoTokenizer.from_pretrained)
    pool = make_pool({"_target_": "mine.tokenizer", "pretrained_model_name_or_path": PATH})
    assert pool.load_tokenizer()(TEXT)["input_ids"]
    register_target("mine.tokenizer", lambda **given: "text")
    with pytest.raises(PoolError, match=r"the registered function <lambda> gave '.*', expected a tokenizer"):
        pool.load_tokenizer()


def test_a_pool_without_one_says_so() -> None:
    """In FusionBench an AssertionError, and no pool could be made without saying `tokenizer=None`."""
    for pool in (CausalLMPool({}), make_pool(None)):
        with pytest.raises(PoolError, match="the pool has no tokenizer; give it one"):
            pool.load_tokenizer()


def test_one_that_cannot_be_loaded() -> None:
    with pytest.raises(PoolError, match="the tokenizer '/nowhere' cannot be loaded"):
        make_pool("/nowhere").load_tokenizer()
    entry = {"_target_": "transformers.NoSuchTokenizer", "pretrained_model_name_or_path": PATH}
    with pytest.raises(PoolError, match="transformers has no tokenizer 'NoSuchTokenizer'"):
        make_pool(entry).load_tokenizer()


def test_a_configuration_cannot_allow_code_to_be_run() -> None:
    pool = make_pool({"pretrained_model_name_or_path": PATH, "trust_remote_code": True})
    with pytest.raises(InputError, match="no file can allow code"):
        pool.load_tokenizer()
    assert pool.load_tokenizer(trust_remote_code=False)(TEXT)["input_ids"]
