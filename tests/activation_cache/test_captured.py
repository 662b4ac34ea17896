"""The cache as a mapping, and what it is moved to and described as, on hand-made captures."""

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch

from hooklens.activation_cache import ActivationCache
from hooklens.errors import CacheError
from tests.activation_cache.captures import CFG, assert_aliases_kept, assert_same_tensors, distinct_bytes, make_cache


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


class TestDescription:
    def test_repr(self):
        assert repr(make_cache(2, 5)).splitlines()[0] == "ActivationCache(22 activations, 5.72 kB, batch 2, pos 5)"
        assert (
            repr(make_cache(1, 5).remove_batch_dim()).splitlines()[0]
            == "ActivationCache(22 activations, 2.86 kB, pos 5)"
        )
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
