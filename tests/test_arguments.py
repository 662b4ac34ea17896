"""Tests of hooklens.arguments: readers of single arguments, and readers declared before a method."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hooklens.arguments import (
    optional,
    read_device,
    read_dtype,
    read_flag,
    read_int,
    read_number,
    read_one_of,
    read_path,
    read_seed,
    read_tensor,
    reads,
    show,
)
from hooklens.causal_lm.calls import CALLING
from hooklens.errors import CacheError, InputError
from tests.annotations import unchecked
from tests.torch_version import FOUR_BITS, traces_whole


class Runner:
    @reads(mode=partial(read_one_of, options=("a", "b", None)), times=read_int, loud=read_flag)
    def run(self, mode, times=1, *, loud=False, other=None):
        return mode, times, loud, other

    @classmethod
    @reads(times=read_int)
    def make(cls, times, **handed_on):
        return times, handed_on

    @reads(**CALLING)
    def call(self, input, *, return_type="logits", logits_at=None, **keywords):
        tripled = input * (3 if return_type == "loss" else 1)
        return tripled + keywords["stop_at_layer"] + keywords["positions"] * keywords["attention_mask"]


def test_a_method_is_handed_plain_values():
    assert Runner().run("a", np.int64(3), loud=np.True_) == ("a", 3, True, None)
    assert Runner().run(mode=None, times=torch.tensor(2), other="x") == (None, 2, False, "x")
    assert Runner.make(np.array(2), more=1) == (2, {"more": 1})
    assert Runner.run.__name__ == "run"


def test_all_refusals_at_once():
    with pytest.raises(InputError) as caught:
        Runner().run("c", 1.5, loud="no")
    assert str(caught.value) == (
        "mode is 'c', expected 'a', 'b' or None; times is 1.5, expected a whole number; loud is 'no', expected True or "
        "False"
    )


def test_arguments_that_are_not_there():
    with pytest.raises(
        TypeError, match=r"Runner.run\(\) got an unexpected keyword argument 'lod'. Did you mean 'loud'"
    ):
        Runner().run("a", lod=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Runner().run()
    with pytest.raises(TypeError, match="multiple values"):
        Runner().run("a", mode="b")
    with pytest.raises(AssertionError, match="takes no"):
        reads(nothing=read_flag)(lambda given: given)


@traces_whole
def test_readers_are_traced_without_a_graph_break():
    """fullgraph=True raises at a graph break; traced as users run it, since beartype draws the items that it checks."""
    keywords = {
        "return_type": "loss",
        "loss_per_token": True,
        "padding_side": None,
        "stop_at_layer": 1,
        "positions": torch.tensor([1, 2], dtype=torch.int32),
        "attention_mask": torch.tensor([1, 0]),
        "past_kv_cache": None,
    }
    runner, given = Runner(), torch.tensor([1, 2])
    compiled = torch.compile(lambda given: runner.call(given, **keywords), fullgraph=True, backend="eager")
    with unchecked():
        assert torch.equal(compiled(given), runner.call(given, **keywords))
        assert compiled(given).tolist() == [5, 7]


@pytest.mark.parametrize("given", [3, np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)])
def test_whole_numbers(given):
    read = read_int(given, what="n", least=3, most=3)
    assert (read, type(read)) == (3, int)


@pytest.mark.parametrize(
    ("given", "bounds", "text"),
    [
        (True, {}, "n is True, expected a whole number$"),
        (np.bool_(True), {}, "n is .*True.*, expected a whole number$"),
        (1.0, {}, "n is 1.0, expected a whole number$"),
        ("1", {}, "n is '1', expected a whole number$"),
        (torch.tensor([1]), {}, r"n is a tensor \[1\] of torch.int64, expected a whole number$"),
        (torch.tensor(1, device="meta"), {}, r"n is a tensor \[\] of torch.int64, expected a whole number$"),
        (np.array([1]), {}, r"n is an array \[1\] of int64, expected a whole number$"),
        (0, {"least": 1}, "n is 0, expected a whole number >= 1$"),
        (4, {"least": 1, "most": 3}, "n is 4, expected a whole number, 1 to 3$"),
        (4, {"most": 3}, "n is 4, expected a whole number <= 3$"),
        (2**31, {"least": 1, "most": 2**31 - 1}, r"n is 2147483648, expected a whole number >= 1, below 2\*\*31$"),
    ],
)
def test_no_whole_numbers(given, bounds, text):
    with pytest.raises(InputError, match=f"^{text}"):
        read_int(given, what="n", **bounds)


def test_seeds_are_those_of_torch():
    for seed in (-(2**63), 0, 2**64 - 1):
        torch.Generator().manual_seed(read_seed(seed, what="seed"))
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(InputError, match=r"^seed is "):
            read_seed(seed, what="seed")


@pytest.mark.parametrize("given", [float("nan"), float("inf"), 10**400, True, "1", None, torch.tensor(1.0), 1j, -1.0])
def test_no_numbers(given):
    with pytest.raises(InputError, match=r"^x is .*, expected a number >= 0$"):
        read_number(given, what="x", expected="a number >= 0", allows=lambda number: number >= 0)


def test_numbers():
    for given in (2, 2.0, np.float32(2), np.int8(2)):
        read = read_number(given, what="x", expected="a number")
        assert (read, type(read)) == (2.0, float)


@pytest.mark.parametrize("given", [np.array(["a"]), torch.zeros(2), ["a"], 0, True, b"a", "A", ""])
def test_none_of_the_words(given):
    with pytest.raises(InputError, match=r"^mode is .*, expected 'a' or 'b'$"):
        read_one_of(given, what="mode", options=("a", "b"))


def test_paths():
    assert read_path("a/b", what="folder") == read_path(Path("a/b"), what="folder") == Path("a/b")
    for given in ("", "a\0b", b"a", 3, None, ["a"]):
        with pytest.raises(InputError, match=r"^folder is .*, expected a path, as text or a pathlib.Path$"):
            read_path(given, what="folder")


def test_dtypes_by_object_and_name():
    for given in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert read_dtype(given, what="dtype") == torch.bfloat16
    for given in (torch.int64, "int64", "nn", "", "float99", float, np.float32, *FOUR_BITS, None):
        with pytest.raises(InputError, match=r"^dtype is .*, expected a floating dtype, as torch.bfloat16$"):
            read_dtype(given, what="dtype")


def test_devices():
    assert read_device("cpu", what="device") == torch.device("cpu")
    for given in ("nope", "", "cuda:99", 10**30, -7):
        with pytest.raises(InputError, match=r"^device is .*, which cannot be used: .+"):
            read_device(given, what="device")
    for given in (None, True, 1.0, ["cpu"]):
        with pytest.raises(InputError, match=r"^device is .*, expected a torch.device or its name, as 'cuda:0'$"):
            read_device(given, what="device")
    with pytest.raises(InputError, match="a dtype is given by name, dtype="):
        read_device(torch.float16, what="device")


def test_tensors_whose_values_can_be_looked_at():
    given = torch.zeros(2)
    assert read_tensor(given, what="x") is given
    with pytest.raises(InputError, match=r"^x is a list, expected a tensor$|^x is \[1\], expected a tensor$"):
        read_tensor([1], what="x")
    with pytest.raises(InputError, match=r"^x is a tensor without values \(device 'meta'\), expected a tensor that"):
        read_tensor(given.to("meta"), what="x")
    with pytest.raises(InputError, match=r"^x is a tensor of layout torch.sparse_coo, expected a tensor that"):
        read_tensor(given.to_sparse(), what="x")


def test_optional_and_the_class_of_an_error():
    read = optional(read_flag)
    assert read(None, what="x") is None
    assert read(False, what="x") is False
    with pytest.raises(CacheError, match=r"^x is 0, expected True or False, or None$"):
        read(0, what="x", error=CacheError)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (object(), "an object"),
        (test_paths, "a function"),
        (int, "the class int"),
        (torch.zeros(2, 3), "a tensor [2, 3] of torch.float32"),
        (np.zeros(2), "an array [2] of float64"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (Path("a"), "PosixPath('a')"),
    ],
)
def test_values_in_messages(given, text):
    assert show(given) == text
