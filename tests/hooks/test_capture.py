"""Tests of hooklens.hooks.capture, alone and through a model."""

import gc

import numpy as np
import pytest
import torch

from hooklens.axes import find_site
from hooklens.errors import HookLensError, InputError
from hooklens.hooks import Call, Capture, HookPoint
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, activations_of, make_model, random_tokens


def kept_storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_nothing_is_copied(network):
    """Each captured tensor is the very memory that the hook point passed on."""
    model, tokens = make_model(network), random_tokens(2, 5)
    passed = {}
    hooks = [(name, lambda t, hook: passed.update({hook.name: t})) for name in activations_of(model)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="*", fwd_hooks=hooks)
    assert list(cache) == list(passed)
    # A point on a shared tensor hands its hooks a copy; what goes on is the tensor itself.
    shared = {name for name, point in model.hook_points().items() if point.shared}
    for name, tensor in passed.items():
        assert (cache[name].data_ptr() == tensor.data_ptr()) is (name not in shared), name
    for layer in range(1, model.cfg.n_layers):
        assert cache["resid_pre", layer].data_ptr() == cache["resid_post", layer - 1].data_ptr()


def test_tensors_are_kept_without_their_graph():
    """A cache kept the whole autograd graph alive."""
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    assert not any(tensor.requires_grad for tensor in cache.values())


@pytest.mark.parametrize("grad", [True, False])
def test_a_conversion_is_made_once_for_all_aliases(grad):
    """`device=` copied each name of one tensor separately: 2.24 times the bytes."""
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    with torch.set_grad_enabled(grad):
        _, plain = model.run_with_cache(tokens)
        _, converted = model.run_with_cache(tokens, dtype=torch.float32)
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in plain.values()}
    assert sum(kept_storages(converted).values()) == 4 * sum(distinct.values())
    assert sum(distinct.values()) < sum(tensor.numel() for tensor in plain.values())
    for name, tensor in converted.items():
        assert torch.equal(tensor, plain[name].float()), name


def test_the_same_device_and_dtype_copy_nothing():
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, dtype=torch.float64, device="cpu")
    assert cache["resid_pre", 1].data_ptr() == cache["resid_post", 0].data_ptr()


@pytest.mark.parametrize(
    ("pos_slice", "columns"),
    [
        (0, [0]),
        (-1, [4]),
        (-5, [0]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(3, 99), [3, 4]),
        ([3, 0], [3, 0]),
        (range(1, 3), [1, 2]),
        (torch.tensor([-1, 1]), [4, 1]),
        (torch.tensor(2), [2]),
        (np.array([0, 4]), [0, 4]),
        (np.arange(5)[::-2], [4, 2, 0]),
        (np.int64(3), [3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("network", ["grouped", "learned, tied"])
def test_pos_slice(network, pos_slice, columns):
    model, tokens = make_model(network), random_tokens(2, 5)
    _, full = model.run_with_cache(tokens, names_filter="*")
    with unchecked():
        _, part = model.run_with_cache(tokens, names_filter="*", pos_slice=pos_slice)
    assert part.positions == tuple(columns)
    for name, tensor in part.items():
        axis = 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
        assert torch.equal(tensor, full[name].index_select(axis, torch.tensor(columns))), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "columns left out are kept alive"


def watch(model):
    """The hook points that a call reached, which is none where it was refused before the forward."""
    reached = []
    model.add_hook("hook_embed", lambda tensor, hook: reached.append(hook.name))
    return reached


@pytest.mark.parametrize(
    ("pos_slice", "text"),
    [
        (5, "^pos_slice: 5 out of range; there are 5 positions run in this call, 0 to 4"),
        (-6, "^pos_slice: -6 out of range; there are 5 positions run in this call, 0 to 4"),
        ([0, 7], r"^pos_slice: \[7\] out of range; there are 5 positions run in this call, 0 to 4"),
        (torch.tensor([0, 7]), r"^pos_slice: \[7\] out of range; there are 5 positions run in this call, 0 to 4"),
        (slice(7, 9), r"^pos_slice=slice\(7, 9, None\) keeps nothing: there are 5 positions run in this call"),
    ],
    ids=str,
)
def test_pos_slice_out_of_range_is_refused_before_the_forward(pos_slice, text):
    """An int past the end gave empty tensors without a word, and a slice there did."""
    model = make_model("bare")
    reached = watch(model)
    with pytest.raises(InputError, match=text):
        model.run_with_cache(random_tokens(2, 5), pos_slice=pos_slice)
    assert reached == []


@pytest.mark.parametrize(
    "pos_slice",
    [(1, 4), [True, False], torch.arange(5) > 2, np.arange(5) > 2, True, 1.0, [], "last", slice("a")],
    ids=str,
)
def test_pos_slice_of_another_kind_is_refused_before_the_forward(pos_slice):
    """A tuple kept its two positions where TransformerLens keeps the range between, a mask positions 0 and 1."""
    model = make_model("bare")
    reached = watch(model)
    with unchecked(), pytest.raises(InputError, match="; expected an int, a slice, or a list of at least one int"):
        model.run_with_cache(random_tokens(2, 5), pos_slice=pos_slice)
    assert reached == []


def test_pos_slice_counts_the_positions_that_pass():
    """A module that is no language model, whose calls have a length only once they run."""
    point = HookPoint(find_site("hook_embed"))
    capture = Capture({"hook_embed": point}, pos_slice=[0, 7])
    with pytest.raises(InputError, match=r"pos_slice: \[7\] out of range; there are 5 positions at 'hook_embed', 0 to"):
        point(torch.zeros(2, 5, 3), Call(capture.listeners))
    with pytest.raises(InputError, match="can mean a slice"), unchecked():
        Capture({"hook_embed": point}, pos_slice=(1, 4))


def test_pos_slice_with_a_cache_counts_the_new_tokens():
    model, tokens = make_model("grouped"), random_tokens(1, 7)
    kv = model.prefill(tokens[:, :4])
    _, whole = model.run_with_cache(tokens[:, 4:], past_kv_cache=kv)
    _, part = model.run_with_cache(tokens[:, 4:], past_kv_cache=kv, pos_slice=0)
    assert part.positions == (0,)
    assert torch.equal(part["pattern", 1], whole["pattern", 1][:, :, :1])
    with pytest.raises(InputError, match="pos_slice: 3 out of range; there are 3 positions run in this call, 0 to 2"):
        model.run_with_cache(tokens[:, 4:], past_kv_cache=kv, pos_slice=3)


def test_pos_slice_needs_axes_that_are_known():
    point = HookPoint()
    capture = Capture({"my_point": point}, pos_slice=0)
    with pytest.raises(HookLensError, match="the axes of 'my_point' are not known"):
        point(torch.zeros(2, 3), Call(capture.listeners))


def test_dtype_must_be_floating():
    with pytest.raises(HookLensError, match=r"kept as torch.int64; expected a floating dtype"):
        Capture({}, dtype=torch.int64)


def count_live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)


@pytest.mark.parametrize("keywords", [{}, {"dtype": torch.float32}, {"pos_slice": -1}, {"names_filter": "resid_post"}])
def test_many_calls_leave_nothing_behind(keywords):
    model, tokens = make_model("bare"), random_tokens(1, 3)
    model.run_with_cache(tokens, **keywords)
    before = count_live_tensors()
    with unchecked():
        for _ in range(40):
            model.run_with_cache(tokens, **keywords)
    assert count_live_tensors() == before


def test_many_calls_with_gradients_leave_nothing_behind():
    model, tokens = make_model("bare"), random_tokens(1, 3)
    model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    before = count_live_tensors()
    with unchecked():
        for _ in range(40):
            model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert count_live_tensors() == before
