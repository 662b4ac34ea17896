"""Tests of hooklens.kv_cache.storage: a cache on disk, and the fingerprint that ties it to a model."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.config import Origin
from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.checkpoints import load_apart
from tests.kv_cache.test_cache import CFG, assert_same, fill, read
from tests.model.networks import make_model, random_tokens


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back(tmp_path, frozen, dtype):
    cache = fill(frozen=frozen).to(dtype=dtype)
    cache.transforms = ("fold_ln", "fold_value_biases")
    cache.adapters = ("one",)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = HookedKeyValueCache.load(tmp_path / "prefix.safetensors")
    assert_same(read(loaded), read(cache))
    assert torch.equal(loaded.last_logits, cache.last_logits)
    assert (loaded.frozen, loaded.fingerprint) == (frozen, cache.fingerprint)
    assert (loaded.transforms, loaded.adapters) == (cache.transforms, cache.adapters)
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
    young = {"transforms", "adapters", "digest"}
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in young}
    save_file(load_apart(path), path, metadata=metadata)
    loaded = HookedKeyValueCache.load(path)
    assert (loaded.transforms, loaded.adapters) == ((), ())
    assert_same(read(loaded), read(cache))
    metadata["transforms"] = "[fold"
    save_file(load_apart(path), path, metadata=metadata)
    with pytest.raises(CacheError, match="cannot read a key-value cache from"):
        HookedKeyValueCache.load(path)


def rewrite(path, *, tensors=None, metadata=None):
    """Change what is in a file as another writer would, without a digest."""
    with safe_open(path, framework="pt") as file:
        kept = {key: value for key, value in file.metadata().items() if key != "digest"}
    held = {**load_apart(path), **(tensors or {})}
    written = {**kept, **(metadata or {})}
    save_file(
        {name: tensor for name, tensor in held.items() if tensor is not None},
        path,
        metadata={key: value for key, value in written.items() if value is not None},
    )


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"n_layers": None}},
        {"metadata": {"n_layers": "two"}},
        {"metadata": {"n_layers": "0"}},
        {"metadata": {"n_layers": "-1"}},
        {"metadata": {"n_layers": "1"}},
        {"metadata": {"n_layers": "3"}},
        {"metadata": {"n_layers": "9" * 30}},
        {"metadata": {"frozen": "yes"}},
        {"metadata": {"frozen": None}},
        {"metadata": {"fingerprint": None}},
        {"metadata": {"transforms": "[1]"}},
        {"metadata": {"transforms": '"fold_ln"'}},
        {"metadata": {"transforms": "{}"}},
        {"metadata": {"transforms": "[" * 5000}},
        {"metadata": {"adapters": "[1]"}},
        {"metadata": {"adapters": "{}"}},
        {"metadata": {"format": "hooklens-kv-cache-9"}},
        {"metadata": {"another": "key"}},
        {"tensors": {"attention_mask": None}},
        {"tensors": {"1.values": None}},
        {"tensors": {"7.keys": torch.zeros(1)}},
        {"tensors": {"attention_mask": torch.zeros(2, 4, dtype=torch.uint8)}},
        {"tensors": {"attention_mask": torch.zeros(10, dtype=torch.uint8)}},
        {"tensors": {"attention_mask": torch.zeros(2, 5)}},
        {"tensors": {"attention_mask": torch.full((2, 5), 2, dtype=torch.uint8)}},
        {"tensors": {"0.keys": torch.zeros(2, 5, 2, 6, dtype=torch.int32)}},
        {"tensors": {"0.keys": torch.zeros(2, 5, 12)}},
        {"tensors": {"0.keys": torch.zeros(2, 5, 3, 6)}},
        {"tensors": {"0.keys": torch.zeros(2, 4, 2, 6), "0.values": torch.zeros(2, 4, 2, 6)}},
        {"tensors": {"last_logits": torch.zeros(3, 23)}},
        {"tensors": {"last_logits": torch.zeros(2, 23, dtype=torch.int64)}},
        {"tensors": {"last_logits": torch.zeros(23)}},
    ],
    ids=str,
)
def test_files_with_wrong_contents_are_refused_by_name(tmp_path, change):
    path = tmp_path / "the file"
    fill().save(path)
    rewrite(path)
    assert_same(read(HookedKeyValueCache.load(path)), read(fill()))
    rewrite(path, **change)
    with unchecked(), pytest.raises(CacheError, match="the file"):
        HookedKeyValueCache.load(path)


def test_every_cut_and_every_flipped_bit_of_the_header_is_noticed(tmp_path):
    path = tmp_path / "the file"
    cache = fill(frozen=True)
    cache.transforms = ("fold_ln",)
    cache.save(path)
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    generator = torch.Generator().manual_seed(0)
    for place in range(8 + size):
        bit = int(torch.randint(8, (1,), generator=generator))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with unchecked(), pytest.raises(CacheError, match="the file"):
            HookedKeyValueCache.load(path)
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with unchecked(), pytest.raises(CacheError, match="the file"):
            HookedKeyValueCache.load(path)


def test_saving_over_the_file_it_came_from(tmp_path):
    """Its tensors may be mapped from the file, which was overwritten under them."""
    path = tmp_path / "file"
    fill().save(path)
    loaded = HookedKeyValueCache.load(path)
    loaded.select([1]).save(path)
    assert_same(read(loaded), read(fill()))
    loaded.save(path)
    assert_same(read(HookedKeyValueCache.load(path)), read(fill()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_keys_and_values_of_one_tensor_are_saved(tmp_path):
    """safetensors refuses tensors that share memory, with an error of its own."""
    keys = torch.randn(1, 3, 2, 6)
    entries = [HookedKeyValueCacheEntry(keys, keys) for _ in range(2)]
    cache = HookedKeyValueCache(entries, torch.ones(1, 3, dtype=torch.bool))
    cache.save(tmp_path / "file")
    assert_same(read(HookedKeyValueCache.load(tmp_path / "file")), read(cache))


def test_a_cache_without_data_is_refused(tmp_path):
    with pytest.raises(CacheError, match="file: tensors on the meta device hold no data: 'attention_mask'"):
        fill().to("meta").save(tmp_path / "file")


def test_a_cache_at_odds_with_itself_is_not_saved(tmp_path):
    cache = fill()
    cache.entries[1].roll_back(3)
    with pytest.raises(CacheError, match=r"layers \[1\] hold"):
        cache.save(tmp_path / "file")
