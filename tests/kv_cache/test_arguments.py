"""Tests of hooklens.kv_cache.arguments: what a cache is handed is used rightly or refused with the reason."""

import inspect
import re

import numpy as np
import pytest
import torch

from hooklens import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.errors import CacheError, HookLensError
from hooklens.kv_cache.arguments import read_rows
from tests.annotations import unchecked
from tests.kv_cache.test_cache import CFG, assert_same, fill, read
from tests.kv_cache.test_entry import draw, make_entry

ANYTHING = [
    None, True, False, 0, 1, -1, 7, 2.0, float("nan"), 1 + 2j, "", "x", "cuda:99", "meta", b"x", "a\0b", (), (1,), [],
    [0], [[0]], [True, False], ["a"], {}, {"a": 1}, {1}, slice(None), slice(1.5), slice(0, 0), slice(None, None, 0),
    range(2), object(), int, lambda: 1, 10**30, -(10**30), CFG, CFG.replace(n_layers=3),
    torch.float32, torch.int64, torch.bfloat16, torch.device("cpu"), torch.device("meta"),
    torch.tensor(1), torch.tensor(True), torch.tensor([0.5]), torch.tensor([1, 0]), torch.tensor([True, False]),
    torch.zeros(0), torch.zeros(2, 5), torch.ones(2, 1), torch.full((2, 1), 2), torch.zeros(2, 23),
    torch.zeros(2, 23, dtype=torch.int64), torch.zeros(2, 5, 2, 6), torch.zeros(2, 1, 2, 6),
    torch.zeros(2, 1, 2, 6, dtype=torch.int64), torch.zeros(2, 1, 2, 6, device="meta"),
    np.int64(1), np.float64(1.0), np.bool_(True), np.array([1, 0]), np.array([0.5]), np.array([[1]]), np.array(1),
    np.array(["a"]),
]  # fmt: skip
"""Values of every kind; some are right for some arguments."""

GOOD = {
    "entries": lambda: fill().entries,
    "previous_attention_mask": lambda: torch.ones(2, 5, dtype=torch.bool),
    "cfg": lambda: CFG,
    "past_keys": lambda: draw(2, 5),
    "past_values": lambda: draw(2, 5),
    "new_keys": lambda: draw(2, 1),
    "new_values": lambda: draw(2, 1),
    "mask_of_new_tokens": lambda: torch.ones(2, 1, dtype=torch.bool),
    "n_columns": lambda: 3,
    "length": lambda: 3,
    "rows": lambda: [1],
    "transforms": lambda: (),
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "batch": lambda: 2,
}

CALLS = {
    "cache": HookedKeyValueCache,
    "init_cache": HookedKeyValueCache.init_cache,
    "append_attention_mask": lambda **given: fill().append_attention_mask(**given),
    "roll_back": lambda **given: fill().roll_back(**given),
    "crop": lambda **given: fill().crop(**given),
    "select": lambda **given: fill().select(**given),
    "expand": lambda **given: fill(1).expand(**given),
    "to": lambda **given: fill().to(**given),
    "check_fits": lambda **given: fill().check_fits(**given),
    "entry": HookedKeyValueCacheEntry,
    "init_cache_entry": HookedKeyValueCacheEntry.init_cache_entry,
    "append": lambda **given: make_entry(2, 5).append(**given),
    "entry roll_back": lambda **given: make_entry(2, 5).roll_back(**given),
}

METHODS = {
    "cache": HookedKeyValueCache.__init__,
    "entry": HookedKeyValueCacheEntry.__init__,
    "init_cache_entry": HookedKeyValueCacheEntry.init_cache_entry,
    "append": HookedKeyValueCacheEntry.append,
    "entry roll_back": HookedKeyValueCacheEntry.roll_back,
}


def parameters(name: str) -> list[inspect.Parameter]:
    method = METHODS.get(name) or getattr(HookedKeyValueCache, name)
    return [one for one in inspect.signature(method).parameters.values() if one.name != "self"]


def good_arguments(name: str) -> dict[str, object]:
    needed = [one.name for one in parameters(name) if one.default is inspect.Parameter.empty]
    return {one: GOOD[one]() if one in GOOD else 1 for one in needed}


ARGUMENTS = [(name, one.name) for name in CALLS for one in parameters(name)]


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_are_taken(name):
    CALLS[name](**good_arguments(name))


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_anything_is_taken_rightly_or_refused_by_the_library(name, argument):
    """No IndexError, AttributeError or torch's own errors from inside, and no cache at odds with itself."""
    refused = 0
    for value in ANYTHING:
        with unchecked():
            try:
                made = CALLS[name](**{**good_arguments(name), argument: value})
            except HookLensError:
                refused += 1
                continue
        if isinstance(made, HookedKeyValueCache):
            assert isinstance(made.frozen, bool)
            assert isinstance(made.has_padding, bool)
            assert made.previous_attention_mask.dtype == torch.bool
            made.check_consistent()
            assert made.clone().batch_size == made.batch_size >= 1
    assert refused > len(ANYTHING) // 2


@pytest.mark.parametrize("name", CALLS)
def test_a_keyword_that_is_not_there_is_a_type_error(name):
    with unchecked(), pytest.raises(TypeError, match="unexpected keyword argument 'n_kv_heads'"):
        CALLS[name](**good_arguments(name), n_kv_heads=1)


@pytest.mark.parametrize("value", [one for one in ANYTHING if not isinstance(one, str)])
def test_paths_and_devices_of_the_wrong_kind(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill().save(tmp_path / "file")
    with unchecked():
        with pytest.raises(CacheError, match=r"path is .*expected a path"):
            fill().save(value)
        with pytest.raises(CacheError, match=r"path is .*expected a path"):
            HookedKeyValueCache.load(value)
        try:
            cache = HookedKeyValueCache.load(tmp_path / "file", device=value)
        except CacheError as error:
            said = str(error)
        else:
            said = "device is" if value in (None, torch.device("cpu")) else "taken"
            assert_same(read(cache), read(fill()))
    assert said.startswith("device")


def test_paths_that_name_no_file(tmp_path):
    for path in ("", "a\0b", str(tmp_path), "x" * 300):
        with pytest.raises(CacheError, match="cannot write the key-value cache"):
            fill().save(path)
        with pytest.raises(CacheError, match="cannot read a key-value cache"):
            HookedKeyValueCache.load(path)


@pytest.mark.parametrize(
    "value", [None, True, 3.5, "x", [1], torch.zeros(2), torch.zeros(3, 23), torch.zeros(2, 23).long()]
)
def test_last_logits_are_a_row_of_floats_for_each_row(value):
    cache = fill()
    with unchecked():
        if value is None:
            cache.last_logits = value
            assert cache.last_logits is None
            return
        with pytest.raises(CacheError, match="last_logits"):
            cache.last_logits = value
    assert cache.last_logits is not None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fill().crop(2.0), "crop: n is 2.0, expected a whole number, 0 to 5"),
        (lambda: fill().crop(True), "crop: n is True, expected a whole number, 0 to 5"),
        (lambda: fill().roll_back("2"), "roll_back: n_columns is '2', expected a whole number, 0 to 5"),
        (lambda: fill(1).expand(np.bool_(True)), r"expand: n is .*True.*, expected a whole number >= 1, below 2\*\*31"),
        (lambda: fill(1).expand(torch.tensor([2])), r"expand: n is a tensor \[1\] of torch.int64, expected a whole"),
        (lambda: fill().select("01"), "rows='01'; expected an int, a slice, or a list of at least one int"),
        (lambda: fill().select([0.5]), r"rows=\[0.5\]; expected an int, a slice"),
        (lambda: fill().to(dtype=torch.int8), "dtype is torch.int8, expected a floating dtype, as torch.bfloat16"),
        (lambda: fill().to("nowhere"), "device is 'nowhere', which cannot be used: "),
        (
            lambda: HookedKeyValueCache.init_cache(CFG, batch_size=0),
            "batch_size is 0, expected a whole number >= 1",
        ),
        (lambda: HookedKeyValueCache.init_cache(3), r"cfg is 3, expected a HookedConfig, model.cfg"),
        (
            lambda: HookedKeyValueCache([make_entry()] * 2, torch.ones(1, 0, dtype=torch.bool)),
            "one entry object stands for several layers, which would all append to it",
        ),
        (
            lambda: HookedKeyValueCache([make_entry()], torch.ones(1, 0, dtype=torch.bool), transforms="fold_ln"),
            "transforms is 'fold_ln', expected a tuple of step names, model.transforms",
        ),
        (lambda: HookedKeyValueCacheEntry(draw(1, 2)[0], draw(1, 2)), r"past_keys: found \[2, 2, 3\] torch.float32"),
        (lambda: make_entry(1, 2).append([1], draw(1, 1)), r"new keys: found a list; expected a tensor \[batch pos"),
    ],
)
def test_what_the_refusals_say(call, text):
    with unchecked(), pytest.raises(CacheError, match=text):
        call()


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, np.uint8])
def test_numpys_integers_are_numbers(kind):
    cache = fill(1)
    assert len(cache.crop(kind(3))) == 3
    assert cache.expand(kind(3)).batch_size == 3
    with unchecked():
        assert cache.select(kind(0)).batch_size == 1
        cache.roll_back(kind(2))
    assert len(cache) == 2


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_rows_are_those_that_python_would_take(n_rows):
    plain = list(range(n_rows))
    for rows in (slice(None), slice(1), slice(-1, None), slice(None, None, -1), slice(0, 9, 2)):
        index = read_rows(rows, n_rows)
        assert (plain[index] if isinstance(index, slice) else index) == plain[rows]
    for given in ([0], [-1, 0, -1], range(n_rows), torch.tensor([0, -n_rows]), np.array([0, 0], dtype=np.int8)):
        assert read_rows(given, n_rows) == [plain[int(row)] for row in given]
    assert read_rows(-n_rows, n_rows) == [0]
    with pytest.raises(CacheError, match=re.escape(f"[{n_rows}] out of range")):
        read_rows([0, n_rows, 0], n_rows)
