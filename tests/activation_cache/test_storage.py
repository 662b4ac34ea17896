"""Caches written to files and read back."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens.activation_cache import ActivationCache
from hooklens.errors import CacheError
from tests.activation_cache.captures import CFG, assert_aliases_kept, assert_same_tensors, make_cache


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
        with pytest.raises(CacheError, match=r"text' cannot be read as an activation cache \(SafetensorError"):
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
