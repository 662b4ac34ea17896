"""Rows of the batch, and rows without their padding, on hand-made captures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.activation_cache import ActivationCache
from hooklens.axes import find_site
from hooklens.errors import CacheError
from tests.activation_cache.captures import CFG, assert_aliases_kept, assert_same_tensors, make_cache
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens


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
    def test_slices_are_those_of_a_python_list(self, batch, rows):
        """Lists of row numbers are the oracle: torch has no slices with a negative step."""
        cache = make_cache(batch, 3, tokens=torch.arange(3 * batch).reshape(batch, 3))
        numbers = list(range(batch))
        wanted = [rows] if isinstance(rows, int) else rows
        if isinstance(rows, slice):
            picked = numbers[rows]
        else:
            picked = [numbers[row] for row in wanted] if all(-batch <= row < batch for row in wanted) else []
        if not picked or len(set(picked)) < len(picked) or (isinstance(rows, list) and len(set(rows)) < len(rows)):
            with pytest.raises(CacheError, match=r"chooses none of the|out of range|more than once"):
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
        with pytest.raises(CacheError, match=r"rows: \[5, -3\] out of range; there are 2 rows in this cache, 0 to 1"):
            cache.apply_slice_to_batch_dim([0, 5, -3])
        with pytest.raises(CacheError, match=r"rows=\[\] is empty"):
            cache.apply_slice_to_batch_dim([])
        with pytest.raises(CacheError, match=r"rows: \(0, -2\) names \[0\] more than once"):
            cache.apply_slice_to_batch_dim([0, -2])
        with pytest.raises(CacheError, match=r"rows=\[True, False\] is a mask"):
            cache.apply_slice_to_batch_dim([True, False])

    @pytest.mark.parametrize("row", [np.int64(1), torch.tensor(1), np.array(1)])
    def test_rows_by_numpy_and_torch_integers(self, row):
        """They were refused, where positions took them."""
        cache = make_cache(2)
        for taken in (cache.apply_slice_to_batch_dim(row), cache.unpad(row).remove_batch_dim()):
            assert_same_tensors(taken, {name: tensor[1] for name, tensor in cache.items()})
        assert_same_tensors(cache.apply_slice_to_batch_dim(np.array([1, 0])), cache.apply_slice_to_batch_dim([1, 0]))
        assert_same_tensors(cache.apply_slice_to_batch_dim(None), cache)

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
        with pytest.raises(CacheError, match=r"unpad: row: 2 out of range; there are 2 rows in this cache"):
            cache.unpad(2)
        for row in (True, 1.0, [0, 1], slice(1), None, "0", torch.tensor(True)):
            with unchecked(), pytest.raises(CacheError, match=r"unpad: row is .*, expected a whole number"):
                cache.unpad(row)
        toy = ActivationCache({"toy.hook_hidden": torch.zeros(2, 3)}, cfg=CFG, attention_mask=mask)
        with pytest.raises(CacheError, match=r"'toy.hook_hidden \[1, 3\]: its axes are not known'"):
            toy.unpad(0)
        part = make_cache(2, 2, tokens=torch.zeros(2, 3, dtype=torch.long), attention_mask=mask)
        with pytest.raises(
            CacheError, match=r"3 new positions \(3 captured\) .* 'hook_embed: 2 positions'.* without logits_at"
        ):
            part.unpad(0)


class TestUnpadSlicedPositions:
    """A cache did not know which positions `pos_slice` had kept: the reversed ones lost the wrong columns."""

    MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])

    @pytest.mark.parametrize("past", [False, True])
    @pytest.mark.parametrize("pos_slice", [-1, 2, slice(1, 4), slice(None, None, -1), [3, 0, 2], slice(None)], ids=str)
    def test_what_is_left_are_the_kept_positions_that_are_tokens(self, pos_slice, past):
        model, tokens = make_model("grouped"), random_tokens(4, 5)
        keywords = {"attention_mask": self.MASK, "names_filter": ["resid_pre", "pattern", "z"]}
        if past:
            past_mask = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]])
            keywords["past_kv_cache"] = model.prefill(random_tokens(4, 2, seed=3), attention_mask=past_mask)
        _, whole = model.run_with_cache(tokens, **keywords)
        _, part = model.run_with_cache(tokens, **keywords, pos_slice=pos_slice)
        for row in range(4):
            # Columns by their place among the row's tokens, in the order in which pos_slice names them.
            places = dict(zip(self.MASK[row].nonzero()[:, 0].tolist(), range(5), strict=False))
            columns = [pos_slice] if isinstance(pos_slice, int) else pos_slice
            named = list(range(5))[columns] if isinstance(columns, slice) else [range(5)[column] for column in columns]
            kept = [places[column] for column in named if column in places]
            if not kept:
                with pytest.raises(CacheError, match=r"only positions \[\d\] were captured \(pos_slice\), and all of"):
                    part.unpad(row)
                continue
            single, expected = part.unpad(row), whole.unpad(row)
            assert single.positions == tuple(kept)
            assert single.tokens.equal(expected.tokens)
            for name, tensor in single.items():
                axis = 2 if name.endswith("pattern") else 1
                assert tensor.equal(expected[name].index_select(axis, torch.tensor(kept))), name
            assert_same_tensors(single.unpad(0), single)

    def test_without_tokens_it_is_not_known(self):
        model = make_model("grouped")
        stream, mask = torch.randn(2, 3, model.cfg.d_model, dtype=torch.float64), torch.tensor([[0, 1, 1], [1, 1, 1]])
        _, cache = model.run_with_cache(stream, start_at_layer=1, attention_mask=mask, pos_slice=[2, 1, 0])
        with pytest.raises(CacheError, match=r"began at a residual stream and only positions \[2, 1, 0\] were capt"):
            cache.unpad(0)
