"""Caches written to files and read back."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens.activation_cache import ActivationCache
from hooklens.errors import CacheError
from tests.activation_cache.captures import CFG, assert_aliases_kept, assert_same_tensors, make_cache
from tests.annotations import unchecked
from tests.checkpoints import load_apart


class TestFiles:
    def test_round_trip(self, tmp_path):
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        cache = make_cache(
            with_grad=True,
            tokens=torch.arange(10).reshape(2, 5),
            attention_mask=mask,
            transforms=("fold_ln", "center_unembed"),
            positions=(4, 3, 2, 1, 0),
        )
        cache.save(tmp_path / "run.safetensors")
        loaded = ActivationCache.load(tmp_path / "run.safetensors")
        assert_same_tensors(loaded, cache)
        assert_aliases_kept(loaded)
        assert loaded["resid_pre", 1] is loaded["resid_post", 0]
        assert loaded.cfg == cache.cfg
        assert loaded.transforms == cache.transforms
        assert loaded.positions == cache.positions
        assert loaded.tokens.equal(cache.tokens)
        assert loaded.attention_mask.equal(mask)
        assert loaded.has_batch_dim
        assert loaded.weights is None
        assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]

    def test_aliases_are_stored_once(self, tmp_path):
        cache = make_cache(2, 64)
        cache.save(tmp_path / "run.safetensors")
        with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
            assert len(file.keys()) == len(cache) - CFG.n_layers
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) == cache.nbytes  # noqa: SIM118

    def test_views_save_their_own_entries(self, tmp_path):
        single = make_cache(3, 4, past=1).to(dtype=torch.bfloat16).apply_slice_to_batch_dim(1)
        single.save(tmp_path / "row")
        loaded = ActivationCache.load(tmp_path / "row")
        assert_same_tensors(loaded, single)
        assert not loaded.has_batch_dim
        assert loaded.tokens is None
        assert loaded.attention_mask is None
        assert loaded.nbytes < single.nbytes

    def test_reshaped_views_of_one_tensor_are_kept_apart(self, tmp_path):
        stream = torch.arange(16.0).reshape(1, 2, 8)
        cache = ActivationCache({"hook_embed": stream, "toy.hook_flat": stream.view(16)}, cfg=CFG)
        cache.save(tmp_path / "run")
        assert_same_tensors(ActivationCache.load(tmp_path / "run"), cache)

    def test_a_cache_with_history_is_saved_without_it(self, tmp_path):
        cache = ActivationCache({"hook_embed": torch.randn(1, 2, 8, requires_grad=True)}, cfg=CFG)
        cache.save(tmp_path / "run")
        assert not ActivationCache.load(tmp_path / "run")["hook_embed"].requires_grad

    def test_saving_over_the_file_it_came_from(self, tmp_path):
        """Tensors of a loaded file may be memory-mapped: truncating the file under them ends the process."""
        make_cache().save(tmp_path / "run")
        loaded = ActivationCache.load(tmp_path / "run")
        loaded.apply_slice_to_batch_dim([1]).save(tmp_path / "run")
        assert_same_tensors(loaded, make_cache())
        assert ActivationCache.load(tmp_path / "run")["hook_embed"].shape[0] == 1

    def test_what_is_no_cache(self, tmp_path):
        (tmp_path / "text").write_text("not a safetensors file")
        with pytest.raises(
            CacheError, match=r"text' cannot be read as an activation cache \(ValueError: .*deserializing header"
        ):
            ActivationCache.load(tmp_path / "text")
        with pytest.raises(CacheError, match=r"absent' cannot be read as an activation cache \(FileNotFoundError"):
            ActivationCache.load(tmp_path / "absent")
        with pytest.raises(CacheError, match="cannot be read as an activation cache"):
            ActivationCache.load(tmp_path)
        save_file({"w": torch.zeros(1)}, tmp_path / "weights")
        with pytest.raises(
            CacheError, match=r"is a safetensors file, but no activation cache of format version 1 \(found None\)"
        ):
            ActivationCache.load(tmp_path / "weights")
        save_file(
            {"w": torch.zeros(1)}, tmp_path / "damaged", metadata={"hooklens.activation_cache": "1", "header": "{}"}
        )
        with pytest.raises(CacheError, match=r"damaged' cannot be read as an activation cache \(KeyError"):
            ActivationCache.load(tmp_path / "damaged")

    def test_where_it_cannot_write(self, tmp_path):
        with pytest.raises(CacheError, match="cannot write the activation cache to"):
            make_cache().save(tmp_path / "no" / "folder" / "run")

    @pytest.mark.parametrize("path", [None, 5, 2.0, b"run", ["run"], torch.zeros(1)])
    def test_paths_of_the_wrong_kind(self, path):
        with unchecked():
            with pytest.raises(CacheError, match=r"path=.*expected a path to a file"):
                make_cache().save(path)
            with pytest.raises(CacheError, match=r"path=.*expected a path to a file"):
                ActivationCache.load(path)

    @pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta"])
    def test_devices_that_cannot_be_read_to(self, tmp_path, device):
        make_cache().save(tmp_path / "run")
        with pytest.raises(CacheError, match="run' cannot be read as an activation cache"):
            ActivationCache.load(tmp_path / "run", device=device)

    def test_activations_without_data(self, tmp_path):
        with pytest.raises(CacheError, match=r"on the meta device hold no data: 'activation\.hook_embed'"):
            ActivationCache({"hook_embed": torch.zeros(1, 2, 8, device="meta")}, cfg=CFG).save(tmp_path / "run")


def rewrite(path, *, header=None, tensors=None, metadata=None):
    """Change what is in a file as another writer would, without a digest."""
    with safe_open(path, framework="pt") as file:
        kept = {key: value for key, value in file.metadata().items() if key != "digest"}
    if callable(header):
        found = json.loads(kept["header"])
        header(found)
        kept["header"] = json.dumps(found)
    elif header is not None:
        kept["header"] = header
    held = {**load_apart(path), **(tensors or {})}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, path, metadata=kept | (metadata or {}))


def put(*path):
    """A change of a header: the last of the arguments is put under the keys before it."""
    *keys, last, value = path

    def change(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return change


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "change",
        [
            {"header": "[]"},
            {"header": "3"},
            {"header": "{"},
            {"header": "[" * 5000},
            {"header": put("cfg", "attn_scale", 10**400)},
            {"header": lambda header: header.pop("cfg")},
            {"header": lambda header: header.pop("has_batch_dim")},
            {"header": put("place_of", [])},
            {"header": put("place_of", "hook_embed", "nothing")},
            {"header": put("place_of", "hook_embed", 3)},
            {"header": put("place_of", "hook_embed", ["x"])},
            {"header": put("place_of", "hook_embed", "tokens")},
            {"header": put("cfg", None)},
            {"header": put("cfg", "d_model", "eight")},
            {"header": put("cfg", "norm", 3)},
            {"header": put("cfg", "positions", [])},
            {"header": put("cfg", "windows", 3)},
            {"header": put("cfg", "another", 3)},
            {"header": put("transforms", "fold_ln")},
            {"header": put("transforms", [1])},
            {"header": put("transforms", None)},
            {"header": put("positions", [0.5])},
            {"header": put("positions", [True])},
            {"header": put("positions", 3)},
            {"header": put("has_batch_dim", "yes")},
            {"header": put("has_batch_dim", False)},
            {"tensors": {"activation.hook_embed": None}},
            {"tensors": {"activation.hook_embed": torch.zeros(2, 5)}},
            {"tensors": {"activation.hook_embed": torch.zeros(2, 5, 8, dtype=torch.int32)}},
            {"tensors": {"another": torch.zeros(2)}},
            {"tensors": {"tokens": torch.zeros(5, dtype=torch.int64)}},
            {"tensors": {"tokens": torch.zeros(2, 5)}},
            {"tensors": {"attention_mask": torch.ones(3, 5)}},
            {"tensors": {"attention_mask": torch.ones(2, 4)}},
            {"tensors": {"attention_mask": torch.ones(5)}},
            {"metadata": {"hooklens.activation_cache": "9"}},
            {"metadata": {"another": "key"}},
        ],
    )
    def test_wrong_contents_are_refused_by_name(self, tmp_path, change):
        path = tmp_path / "the file"
        cache = make_cache(tokens=torch.arange(10).reshape(2, 5), attention_mask=torch.ones(2, 5))
        cache.save(path)
        rewrite(path)
        assert_same_tensors(ActivationCache.load(path), cache)
        rewrite(path, **change)
        with unchecked(), pytest.raises(CacheError, match="the file"):
            ActivationCache.load(path)

    def test_every_cut_and_flipped_bits_of_the_header_are_noticed(self, tmp_path):
        path = tmp_path / "the file"
        make_cache(1, 2, tokens=torch.arange(2).reshape(1, 2), transforms=("fold_ln",)).save(path)
        whole = path.read_bytes()
        (size,) = struct.unpack("<Q", whole[:8])
        generator = torch.Generator().manual_seed(0)
        for place in [*range(64), *range(64, 8 + size, 7)]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            path.write_bytes(damaged)
            with unchecked(), pytest.raises(CacheError, match="the file"):
                ActivationCache.load(path)
        for length in [*range(0, len(whole), 211), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with unchecked(), pytest.raises(CacheError, match="the file"):
                ActivationCache.load(path)
