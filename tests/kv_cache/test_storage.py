"""Tests of hooklens.kv_cache.storage: a cache on disk, and the fingerprint that ties it to a model."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hooklens import HookedKeyValueCache
from hooklens.config import Origin
from hooklens.errors import CacheError
from tests.kv_cache.test_cache import CFG, assert_same, fill, read
from tests.model.networks import make_model, random_tokens


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back(tmp_path, frozen, dtype):
    cache = fill(frozen=frozen).to(dtype=dtype)
    cache.transforms = ("fold_ln", "fold_value_biases")
    cache.save(tmp_path / "prefix.safetensors")
    loaded = HookedKeyValueCache.load(tmp_path / "prefix.safetensors")
    assert_same(read(loaded), read(cache))
    assert torch.equal(loaded.last_logits, cache.last_logits)
    assert (loaded.frozen, loaded.fingerprint) == (frozen, cache.fingerprint)
    assert loaded.transforms == cache.transforms
    loaded.check_consistent()


def test_views_are_saved_as_what_they_show(tmp_path):
    cache = fill(1, frozen=True).expand(3).crop(4)
    cache.save(tmp_path / "part")
    loaded = HookedKeyValueCache.load(tmp_path / "part")
    assert_same(read(loaded), read(cache))
    assert loaded.last_logits is None


def test_loaded_cache_gives_the_same_logits(tmp_path):
    model = make_model("grouped")
    cache = model.prefill(random_tokens(1, 6))
    cache.save(tmp_path / "prefix")
    suffixes = random_tokens(3, 2, seed=4)
    expected = model(suffixes, past_kv_cache=cache)
    assert torch.equal(model(suffixes, past_kv_cache=HookedKeyValueCache.load(tmp_path / "prefix")), expected)
    other = make_model(model.cfg.replace(act_fn="gelu"))
    with pytest.raises(CacheError, match="made by a model with another configuration"):
        other(suffixes, past_kv_cache=HookedKeyValueCache.load(tmp_path / "prefix"))


def test_files_that_hold_no_cache_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CacheError, match=r"cannot read a key-value cache from .*missing"):
        HookedKeyValueCache.load(tmp_path / "missing")
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CacheError, match="cannot read a key-value cache from"):
        HookedKeyValueCache.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CacheError, match="is not a saved key-value cache"):
        HookedKeyValueCache.load(path)
    with pytest.raises(CacheError, match="cannot write the key-value cache"):
        fill().save(tmp_path / "no such folder" / "file")


def test_cut_off_and_incomplete_files_are_refused(tmp_path):
    path = tmp_path / "file"
    fill().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CacheError, match="cannot read"):
        HookedKeyValueCache.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "hooklens-kv-cache-1", "n_layers": "2"})
    with pytest.raises(CacheError, match="cannot read"):
        HookedKeyValueCache.load(path)


def test_fingerprint_is_written_and_names_the_network_only(tmp_path):
    path = tmp_path / "file"
    fill().save(path)
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata["fingerprint"] == CFG.fingerprint
    origin = Origin(family="any", hub_config="{}")
    assert CFG.replace(origin=origin).fingerprint == CFG.fingerprint
    assert CFG.replace(d_vocab=24).fingerprint != CFG.fingerprint


def test_a_file_without_a_record_of_processing_counts_as_unprocessed(tmp_path):
    """Files written before caches carried the record have none."""
    path = tmp_path / "file"
    cache = make_model("grouped").prefill(random_tokens(1, 4))
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "transforms"}
    save_file(load_file(path), path, metadata=metadata)
    loaded = HookedKeyValueCache.load(path)
    assert loaded.transforms == ()
    assert_same(read(loaded), read(cache))
    metadata["transforms"] = "[fold"
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(CacheError, match="cannot read a key-value cache from"):
        HookedKeyValueCache.load(path)
