"""Tests of hooklens.pool.arguments."""

import inspect
from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.pool.arguments import merge_arguments, to_ours, to_transformers


def test_a_later_place_counts() -> None:
    """As in FusionBench: the pool's arguments take the place of the model's own, and the call's of both."""
    own = {"_target_": "x", "source": "a", "torch_dtype": "float16", "revision": "one"}
    pool = {"dtype": "bfloat16", "variant": "two"}
    assert merge_arguments(own, {}, {}, what="m") == {"source": "a", "torch_dtype": torch.float16, "revision": "one"}
    merged = merge_arguments(own, pool, {}, what="m")
    assert merged == {"source": "a", "dtype": torch.bfloat16, "revision": "one", "variant": "two"}
    merged = merge_arguments(own, pool, {"torch_dtype": "fp64", "variant": None}, what="m")
    assert merged == {"source": "a", "torch_dtype": torch.float64, "revision": "one", "variant": None}
    assert own["torch_dtype"] == "float16"
    assert pool == {"dtype": "bfloat16", "variant": "two"}


def test_a_device_takes_the_place_of_a_device_map() -> None:
    assert merge_arguments({"device_map": "auto"}, {}, {"device": "cpu"}, what="m") == {"device": "cpu"}


@pytest.mark.parametrize(
    "place",
    [{"torch_dtype": "bf16", "dtype": "fp16"}, {"source": "a", "pretrained_model_name_or_path": "b"}],
)
def test_two_words_for_one_thing_in_one_place(place: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="say one thing in two ways"):
        merge_arguments({}, {}, place, what="m")


def test_only_a_call_allows_code_to_be_run() -> None:
    for own, pool in (({"trust_remote_code": True}, {}), ({}, {"trust_remote_code": True})):
        with pytest.raises(InputError, match="no file can allow code"):
            merge_arguments(own, pool, {}, what="m")
        for said in (True, False):
            merged = merge_arguments(own, pool, {"trust_remote_code": said}, what="m")
            assert merged == {"trust_remote_code": said}
    assert merge_arguments({"trust_remote_code": False}, {}, {}, what="m") == {"trust_remote_code": False}
    with pytest.raises(InputError, match="trust_remote_code is 'yes', expected True or False"):
        merge_arguments({}, {}, {"trust_remote_code": "yes"}, what="m")
    with pytest.raises(InputError, match="no file can allow code"):
        merge_arguments({"trust_remote_code": "yes"}, {}, {}, what="m")


def test_every_argument_of_ours_is_taken() -> None:
    """A new argument of `from_pretrained` is one of pools."""
    names = list(inspect.signature(HookedCausalLM.from_pretrained).parameters)
    assert "quantize" in names
    given = {name: None for name in names if name not in ("source", "dtype", "device_map")}
    assert to_ours({**given, "source": "a"}, what="m").keys() == {*given, "source"}


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"pretrained_model_name_or_path": "a"}, {"source": "a"}),
        ({"torch_dtype": torch.float16}, {"dtype": torch.float16}),
        ({"dtype": None}, {"dtype": "auto"}),
        ({"device_map": "auto"}, {"device_map": "auto"}),
        ({"device_map": {"": "cpu"}}, {"device_map": {"": "cpu"}}),
        ({"device_map": "cpu"}, {"device": "cpu"}),
        ({"device_map": 0}, {"device": 0}),
        ({"device_map": None}, {"device_map": None}),
        ({"trust_remote_code": True}, {}),
        ({"low_cpu_mem_usage": True, "attn_implementation": "sdpa", "use_cache": False}, {}),
        ({"attn_implementation": None, "quantization_config": None, "anything": None}, {}),
    ],
)
def test_what_arguments_of_transformers_are_here(given: dict[str, Any], ours: dict[str, Any]) -> None:
    assert to_ours(given, what="m") == ours


def test_arguments_without_a_counterpart_are_refused_with_what_to_do() -> None:
    given = {
        "attn_implementation": "flash_attention_2",
        "use_cache": True,
        "load_in_4bit": True,
        "use_safetensors": True,
        "quantisation": "int8",
        "tp_plan": "auto",
    }
    with pytest.raises(InputError) as caught:
        to_ours(given, what="models.a")
    text = str(caught.value)
    assert text.startswith("models.a: attn_implementation='flash_attention_2': a hooked model attends with PyTorch's")
    assert "load_in_4bit=True: say quantize='int8', 'int4' or 'keep'" in text
    assert all(name in text for name in given)
    assert text.endswith("None in the call leaves an argument out; hooked=False hands all to transformers")


def test_arguments_for_transformers() -> None:
    given = {
        "source": "a",
        "torch_dtype": torch.float16,
        "attn_implementation": "eager",
        "device": "cpu",
        "token": None,
    }
    theirs, device = to_transformers(given, what="m")
    assert theirs == {"source": "a", "dtype": torch.float16, "attn_implementation": "eager", "token": None}
    assert device == torch.device("cpu")
    assert to_transformers({"dtype": None}, what="m") == ({}, None)
    with pytest.raises(InputError, match="m: transformers has no layers, n_ctx; leave it out"):
        to_transformers({"layers": [0], "n_ctx": 4, "quantize": None}, what="m")
