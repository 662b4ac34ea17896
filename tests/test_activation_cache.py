"""Tests of hooklens.activation_cache on hand-made captures whose every entry is known."""

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens.activation_cache import ActivationCache, MissingActivationError
from hooklens.axes import find_site
from hooklens.config import HookedConfig, NormConfig, RotaryPositions
from hooklens.errors import CacheError

CFG = HookedConfig(
    d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, d_vocab=11, n_ctx=16, positions=RotaryPositions(dim=2),
    norm=NormConfig(kind="rms", eps=1e-6, bias=False), windows=(None, 4, None),
)  # fmt: skip


def make_cache(batch=2, pos=5, *, past=0, cfg=CFG, with_grad=False, **inputs):
    """A capture with a fused query-key-value tensor, and with the stream shared by neighbouring blocks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"hook_embed": draw(batch, pos, cfg.d_model)}
    stream = tensors["hook_embed"]
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        # detach() gives another object for the same tensor, as captures do
        tensors[f"{block}.hook_resid_pre"] = stream.detach()
        tensors[f"{block}.ln1.hook_scale"] = draw(batch, pos, 1)
        fused = draw(batch, pos, cfg.n_heads + 2 * cfg.n_kv_heads, cfg.d_head)
        q, k, v = fused.split([cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads], dim=2)
        tensors |= {f"{block}.attn.hook_q": q, f"{block}.attn.hook_k": k, f"{block}.attn.hook_v": v}
        tensors[f"{block}.attn.hook_pattern"] = draw(batch, cfg.n_heads, pos, past + pos).softmax(-1)
        stream = stream + draw(batch, pos, cfg.d_model)
        tensors[f"{block}.hook_resid_post"] = stream
    if with_grad:
        tensors["blocks.1.attn.hook_pattern_grad"] = draw(batch, cfg.n_heads, pos, past + pos)
    return ActivationCache(tensors, cfg=cfg, **inputs)


def distinct_bytes(cache):
    """Bytes of the distinct storages, counted by hand."""
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.values()}.values()
    )


def assert_same_tensors(cache, expected):
    assert list(cache) == list(expected)
    for name, tensor in cache.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.equal(expected[name]), name


def assert_aliases_kept(cache):
    for layer in range(1, CFG.n_layers):
        assert cache["resid_pre", layer].data_ptr() == cache["resid_post", layer - 1].data_ptr()
    assert cache["resid_pre", 0].data_ptr() == cache["hook_embed"].data_ptr()


class TestMapping:
    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("blocks.2.attn.hook_pattern", "blocks.2.attn.hook_pattern"),
            (("pattern", 2), "blocks.2.attn.hook_pattern"),
            (("attn", 2), "blocks.2.attn.hook_pattern"),
            (("scale", 0, "ln1"), "blocks.0.ln1.hook_scale"),
            ("k1", "blocks.1.attn.hook_k"),
            (("k1",), "blocks.1.attn.hook_k"),
            (("resid_pre", -1), "blocks.2.hook_resid_pre"),
            (("pattern_grad", 1), "blocks.1.attn.hook_pattern_grad"),
            (("pattern_grad", -2), "blocks.1.attn.hook_pattern_grad"),
            ("blocks.1.attn.hook_pattern_grad", "blocks.1.attn.hook_pattern_grad"),
            ("embed", "hook_embed"),
        ],
    )
    def test_keys(self, key, name):
        cache = make_cache(with_grad=True)
        assert cache[key] is dict(cache.items())[name]
        assert key in cache
        assert cache.get(key) is cache[name]

    def test_is_an_immutable_mapping(self):
        cache = make_cache()
        assert isinstance(cache, Mapping)
        assert len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.values()) == 1 + 3 * 7
        with pytest.raises(TypeError, match="does not support item assignment"):
            cache["hook_embed"] = torch.zeros(1)
        with pytest.raises(TypeError, match="does not support item deletion"):
            del cache["hook_embed"]

    def test_does_not_follow_the_mapping_it_was_made_of(self):
        tensors = {"hook_embed": torch.zeros(1, 2, 8)}
        cache = ActivationCache(tensors, cfg=CFG)
        tensors.clear()
        assert list(cache) == ["hook_embed"]

    def test_names_outside_the_grammar_are_kept(self):
        cache = ActivationCache({"toy.hook_hidden": torch.zeros(2, 3)}, cfg=CFG)
        assert cache["toy.hook_hidden"].shape == (2, 3)

    def test_equality_is_identity(self):
        """Mapping compares the tensors, which raises that their truth value is ambiguous."""
        cache = make_cache()
        assert cache == cache  # noqa: PLR0124 (the point of the test)
        assert cache != make_cache()
        assert len({cache, make_cache()}) == 2

    def test_copies_and_pickles(self):
        cache = make_cache()
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert_same_tensors(twin, cache)
            assert twin.cfg == cache.cfg

    def test_shares_the_weights(self):
        weights = {"embed.W_E": torch.zeros(11, 8)}
        cache = make_cache(weights=weights)
        for derived in (cache, cache.to(dtype=torch.float64), cache.apply_slice_to_batch_dim(0), cache.unpad(0)):
            assert derived.weights is weights


class TestMissing:
    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (("z", 1), r"activation 'blocks\.1\.attn\.hook_z' was not captured; the cache holds 'hook_embed', "
             r".* and 14 more\. Add 'blocks\.1\.attn\.hook_z' to names_filter to have it$"),
            (("q_grad", 1), r"the gradient of 'blocks\.1\.attn\.hook_q' was not captured; run with incl_bwd=True"),
            ("blocks.1.attn.hook_patern", r"no hook point is called .* Did you mean 'blocks\.1\.attn\.hook_pattern'"),
            (("patern", 1), r"no hook point is called 'patern'\. Did you mean 'pattern'"),
            ("blocks.7.hook_resid_pre", r"the model has no activation .*: it has 3 layers, 0 to 2"),
            (("resid_pre", 3), "layer 3 is out of range; the model has 3 layers"),
            (("scale", 1), "needs the module it sits in"),
            ("pattern", "exists once per block: give the layer"),
            ("hook_pos_embed", "the model has no activation 'hook_pos_embed': its positions are not learned vectors"),
            (("pre_linear", 0), "its MLPs are not gated"),
            (("scale", 0, "q_norm"), "it has no query-key norm"),
            (("normalized", 0, "ln2_post"), "it has no norms after its branches"),
        ],
    )  # fmt: skip
    def test_the_reason_is_told(self, key, text):
        cache = make_cache()
        with pytest.raises(MissingActivationError, match=text):
            cache[key]
        assert key not in cache
        assert cache.get(key) is None

    @pytest.mark.parametrize(
        ("key", "changes", "text"),
        [
            (("resid_mid", 0), {"wiring": "parallel"}, "its blocks are parallel"),
            (("scale", 0, "ln2"), {"wiring": "parallel", "shared_norm": True}, "its MLPs have no norm of their own"),
            (("scale", 0, "ln1"), {"norm_before": False, "norm_after": True}, "it has no norms before its branches"),
            (("rot_q", 0), {"positions": None}, "its positions are not rotary"),
        ],
    )
    def test_the_config_decides_what_a_model_has(self, key, changes, text):
        with pytest.raises(MissingActivationError, match=text):
            ActivationCache({}, cfg=CFG.replace(**changes))[key]
        with pytest.raises(MissingActivationError, match="was not captured; the cache is empty"):
            ActivationCache({}, cfg=CFG)[key]

    def test_is_a_key_error_that_prints_as_text(self):
        with pytest.raises(KeyError) as caught:
            make_cache()["z", 1]
        assert isinstance(caught.value, CacheError)
        assert str(caught.value).startswith("activation 'blocks.1.attn.hook_z' was not captured")


class TestDescription:
    def test_repr(self):
        assert repr(make_cache(2, 5)) == "ActivationCache(22 activations, 5.72 kB, batch 2, pos 5)"
        assert repr(make_cache(1, 5).remove_batch_dim()) == "ActivationCache(22 activations, 2.86 kB, pos 5)"
        assert repr(ActivationCache({}, cfg=CFG)) == "ActivationCache(0 activations, 0 B)"
        assert "batch 2, pos 3" in repr(ActivationCache({}, cfg=CFG, tokens=torch.zeros(2, 3, dtype=torch.long)))

    def test_nbytes_counts_shared_memory_once(self):
        cache = make_cache(2, 5)
        per_layer = 2 * 5 * 1 + 2 * 5 * 8 * 2 + 2 * 4 * 5 * 5 + 2 * 5 * 8
        assert cache.nbytes == 4 * (2 * 5 * 8 + 3 * per_layer) == distinct_bytes(cache)

    def test_nbytes_counts_the_whole_memory_behind_a_view(self):
        cache = make_cache(4, 5)
        assert cache.apply_slice_to_batch_dim(slice(0, 1)).nbytes == cache.nbytes

    def test_to_dataframe(self):
        table = make_cache(2, 5, past=1).to_dataframe()
        assert list(table.columns) == ["name", "axes", "shape", "dtype", "bytes"]
        row = table.set_index("name").loc["blocks.1.attn.hook_pattern"]
        assert row.tolist() == [("batch", "head", "query", "key"), (2, 4, 5, 6), "float32", 2 * 4 * 5 * 6 * 4]
        assert ActivationCache({}, cfg=CFG).to_dataframe().empty
        single = make_cache(1, 5).remove_batch_dim().to_dataframe().set_index("name")
        assert single.loc["hook_embed", "axes"] == ("pos", "d_model")

    @pytest.mark.parametrize(
        ("inputs", "text"),
        [
            ({"tokens": torch.zeros(3)}, r"tokens has shape \[3\]; expected \[batch pos\]"),
            ({"attention_mask": torch.zeros(3)}, r"attention_mask has shape \[3\]; expected \[batch key\]"),
            (
                {"tokens": torch.zeros(2, 5), "attention_mask": torch.ones(1, 5)},
                r"tokens have shape \[2, 5\] and attention_mask \[1, 5\]; expected the same rows",
            ),
            (
                {"tokens": torch.zeros(2, 5), "attention_mask": torch.ones(2, 4)},
                "a mask over the new tokens or over past",
            ),
        ],
    )
    def test_inputs_that_do_not_fit(self, inputs, text):
        with pytest.raises(CacheError, match=text):
            ActivationCache({}, cfg=CFG, **inputs)


class TestTo:
    def test_dtype_changes_floating_tensors_only(self):
        tensors = {"hook_embed": torch.randn(1, 2, 8), "toy.hook_index": torch.arange(3)}
        tokens, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
        cache = ActivationCache(tensors, cfg=CFG, tokens=tokens, attention_mask=mask, transforms=("fold_ln",))
        half = cache.to(dtype=torch.bfloat16)
        assert half["hook_embed"].equal(tensors["hook_embed"].bfloat16())
        assert half["toy.hook_index"] is tensors["toy.hook_index"]
        assert half.tokens is tokens
        assert half.attention_mask is mask
        assert half.transforms == ("fold_ln",)
        assert cache["hook_embed"].dtype == torch.float32

    def test_copies_each_distinct_tensor_once(self):
        """TransformerLens 4.3 copies every alias of a tensor separately: 2.24 times the bytes."""
        cache = make_cache()
        converted = cache.to(dtype=torch.float64)
        assert converted.nbytes == 2 * cache.nbytes == distinct_bytes(converted)
        assert_aliases_kept(converted)
        assert_same_tensors(converted, {name: tensor.double() for name, tensor in cache.items()})

    def test_what_is_there_already_is_shared(self):
        cache = make_cache()
        for same in (cache.to(), cache.to("cpu"), cache.to("cpu", torch.float32)):
            assert all(tensor.data_ptr() == cache[name].data_ptr() for name, tensor in same.items())

    def test_device(self):
        """The meta device stands in for another one: it needs no hardware, and has no memory to confuse."""
        moved = make_cache(tokens=torch.zeros(2, 5, dtype=torch.long)).to("meta")
        assert {tensor.device.type for tensor in (*moved.values(), moved.tokens)} == {"meta"}
        assert moved["resid_pre", 1] is moved["resid_post", 0]
        assert moved["resid_pre", 2] is not moved["resid_pre", 1]

    def test_a_tensor_with_history_is_no_alias_of_its_detached_twin(self):
        leaf = torch.randn(1, 2, 8, requires_grad=True)
        cache = ActivationCache({"hook_embed": leaf.detach(), "blocks.0.hook_resid_pre": leaf}, cfg=CFG)
        cache.to(dtype=torch.float64)["resid_pre", 0].sum().backward()
        assert leaf.grad.equal(torch.ones(1, 2, 8))

    def test_an_integer_dtype_is_refused(self):
        with pytest.raises(CacheError, match=r"dtype is torch.int32; expected a floating one"):
            make_cache().to(dtype=torch.int32)


class TestBatchAxis:
    def test_remove_batch_dim(self):
        tokens = torch.zeros(1, 5, dtype=torch.long)
        cache = make_cache(1, 5, tokens=tokens)
        single = cache.remove_batch_dim()
        assert not single.has_batch_dim
        assert_same_tensors(single, {name: tensor.squeeze(0) for name, tensor in cache.items()})
        assert single["hook_embed"].data_ptr() == cache["hook_embed"].data_ptr()
        assert single.tokens is tokens
        assert single.remove_batch_dim() is single
        assert single.axes_of("blocks.0.attn.hook_pattern") == ("head", "query", "key")

    def test_remove_batch_dim_of_a_larger_batch(self):
        with pytest.raises(
            CacheError, match=r"not size 1 in 'hook_embed \[2, 5, 8\]', .* and 17 more; take one row first"
        ):
            make_cache(2, 5).remove_batch_dim()

    @given(
        batch=st.integers(1, 5),
        rows=st.one_of(st.slices(5), st.integers(-5, 4), st.lists(st.integers(-5, 4), min_size=1, max_size=6)),
    )
    @settings(deadline=None)
    def test_slices_are_those_of_a_python_list(self, batch, rows):
        """Lists of row numbers are the oracle: torch has no slices with a negative step."""
        cache = make_cache(batch, 3, tokens=torch.arange(3 * batch).reshape(batch, 3))
        numbers = list(range(batch))
        wanted = [rows] if isinstance(rows, int) else rows
        if isinstance(rows, slice):
            picked = numbers[rows]
        else:
            picked = [numbers[row] for row in wanted] if all(-batch <= row < batch for row in wanted) else []
        if not picked:
            with pytest.raises(CacheError, match=r"select none of the|are not in this cache"):
                cache.apply_slice_to_batch_dim(rows)
            return
        taken = cache.apply_slice_to_batch_dim(rows)
        assert taken.has_batch_dim is not isinstance(rows, int)
        expected = {name: torch.stack([tensor[row] for row in picked]) for name, tensor in cache.items()}
        if isinstance(rows, int):
            expected = {name: tensor[0] for name, tensor in expected.items()}
        assert_same_tensors(taken, expected)
        assert taken.tokens.tolist() == [cache.tokens.tolist()[row] for row in picked]
        assert_aliases_kept(taken)

    def test_evenly_spaced_rows_are_views(self):
        cache = make_cache(5, 3)
        for rows in (2, slice(1, 3), slice(None, None, 2), [0, 1], [1, 3]):
            taken = cache.apply_slice_to_batch_dim(rows)
            assert taken.nbytes == cache.nbytes
            assert all(taken[name]._base is not None for name in ("hook_embed", "blocks.1.attn.hook_pattern"))

    def test_rows_that_are_not_there(self):
        cache = make_cache(2)
        with pytest.raises(CacheError, match=r"rows \[5, -3\] are not in this cache; it has 2 rows, 0 to 1"):
            cache.apply_slice_to_batch_dim([0, 5, -3])
        with pytest.raises(CacheError, match="an empty list selects no rows"):
            cache.apply_slice_to_batch_dim([])
        with pytest.raises(CacheError, match=r"rows \[True, False\] are not in this cache"):
            cache.apply_slice_to_batch_dim([True, False])

    def test_without_a_batch_axis(self):
        single = make_cache(1).remove_batch_dim()
        with pytest.raises(CacheError, match="apply_slice_to_batch_dim: this cache has no batch axis"):
            single.apply_slice_to_batch_dim(0)
        with pytest.raises(CacheError, match="unpad: this cache has no batch axis"):
            single.unpad(0)

    def test_activations_that_differ_in_batch(self):
        cache = ActivationCache({"hook_embed": torch.zeros(2, 1, 8), "unembed.hook_in": torch.zeros(3, 1, 8)}, cfg=CFG)
        with pytest.raises(CacheError, match=r"the activations have batch sizes \[2, 3\]"):
            cache.apply_slice_to_batch_dim(0)


def strip_by_hand(name, tensor, row, key_mask):
    """Row `row` of an activation without masked positions, by boolean indexing along each axis."""
    kept = tensor[row : row + 1]
    for axis, word in enumerate(find_site(name.removesuffix("_grad")).axes):
        size = kept.shape[axis]
        if word in {"pos", "query", "key"}:
            kept = kept.transpose(0, axis)[key_mask[len(key_mask) - size :]].transpose(0, axis)
    return kept


class TestUnpad:
    @given(
        masks=st.integers(1, 6).flatmap(
            lambda pos: st.lists(
                st.lists(st.booleans(), min_size=pos, max_size=pos).filter(any), min_size=1, max_size=3
            )
        ),
        past=st.integers(0, 3),
        data=st.data(),
    )
    @settings(deadline=None)
    def test_any_mask(self, masks, past, data):
        """Left, right and inner padding, with and without past keys."""
        batch, pos = len(masks), len(masks[0])
        past_masks = [data.draw(st.lists(st.booleans(), min_size=past, max_size=past)) for _ in masks]
        full = torch.tensor([[*old, *new] for old, new in zip(past_masks, masks, strict=True)])
        tokens = torch.arange(batch * pos).reshape(batch, pos)
        cache = make_cache(batch, pos, past=past, with_grad=True, tokens=tokens, attention_mask=full.long())
        row = data.draw(st.integers(-batch, batch - 1))
        unpadded = cache.unpad(row)
        row %= batch
        assert_same_tensors(
            unpadded, {name: strip_by_hand(name, tensor, row, full[row]) for name, tensor in cache.items()}
        )
        assert unpadded.tokens.tolist() == [tokens[row][full[row, past:]].tolist()]
        assert unpadded.attention_mask.tolist() == [[1] * int(full[row].sum())]
        assert_aliases_kept(unpadded)
        assert_same_tensors(unpadded.unpad(0), unpadded)

    def test_a_mask_over_the_new_tokens_keeps_all_past_keys(self):
        cache = make_cache(
            2,
            3,
            past=2,
            tokens=torch.zeros(2, 3, dtype=torch.long),
            attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        )
        unpadded = cache.unpad(0)
        assert unpadded["pattern", 1].equal(cache["pattern", 1][:1, :, 1:, :][..., [0, 1, 3, 4]])
        assert unpadded["resid_pre", 1].equal(cache["resid_pre", 1][:1, 1:])

    def test_contiguous_positions_are_views(self):
        cache = make_cache(2, 4, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
        for row, first in ((0, 1), (1, 0)):
            expected = cache["resid_pre", 1][row, first]
            assert cache.unpad(row)["resid_pre", 1].data_ptr() == expected.data_ptr()

    def test_without_a_mask_nothing_is_padding(self):
        cache = make_cache(2, 4)
        assert_same_tensors(cache.unpad(1), {name: tensor[1:] for name, tensor in cache.items()})

    def test_what_cannot_be_unpadded(self):
        mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
        cache = make_cache(2, 3, attention_mask=mask)
        with pytest.raises(CacheError, match="rules out every position of this row"):
            cache.unpad(1)
        with pytest.raises(CacheError, match=r"rows \[2\] are not in this cache; it has 2 rows"):
            cache.unpad(2)
        toy = ActivationCache({"toy.hook_hidden": torch.zeros(2, 3)}, cfg=CFG, attention_mask=mask)
        with pytest.raises(CacheError, match=r"'toy.hook_hidden \[1, 3\]: its axes are not known'"):
            toy.unpad(0)
        part = make_cache(2, 2, tokens=torch.zeros(2, 3, dtype=torch.long), attention_mask=mask)
        with pytest.raises(
            CacheError, match=r"the run has 3 new positions .* 'hook_embed: 2 positions'.* without pos_slice"
        ):
            part.unpad(0)


class TestFiles:
    def test_round_trip(self, tmp_path):
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        cache = make_cache(
            with_grad=True,
            tokens=torch.arange(10).reshape(2, 5),
            attention_mask=mask,
            transforms=("fold_ln", "center_unembed"),
        )
        cache.save(tmp_path / "run.safetensors")
        loaded = ActivationCache.load(tmp_path / "run.safetensors")
        assert_same_tensors(loaded, cache)
        assert_aliases_kept(loaded)
        assert loaded["resid_pre", 1] is loaded["resid_post", 0]
        assert loaded.cfg == cache.cfg
        assert loaded.transforms == cache.transforms
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
