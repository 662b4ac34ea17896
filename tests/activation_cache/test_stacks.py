"""Stacks with any number of component axes, read through the norm of a run."""

import pytest
import torch
from torch.testing import assert_close

from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, make_model, random_tokens


@pytest.fixture(params=CONFIGS)
def cache(request):
    return make_model(request.param).run_with_cache(random_tokens(2, 5))[1]


def test_any_number_of_component_axes(cache):
    """Stacks without a component axis, and those with two, were refused; TransformerLens 2.x takes them."""
    stack = cache.get_full_resid_decomposition()[:12]
    whole, attributed = cache.apply_ln_to_stack(stack), cache.logit_attrs(stack, torch.tensor([3, 4]))
    for shape in ((3, 4), (2, 1, 6), (12,)):
        assert_close(cache.apply_ln_to_stack(stack.unflatten(0, shape)), whole.unflatten(0, shape))
        attributions = cache.logit_attrs(stack.unflatten(0, shape), torch.tensor([3, 4]))
        assert_close(attributions, attributed.unflatten(0, shape))
    assert_close(cache.apply_ln_to_stack(stack[1]), whole[1])
    assert_close(cache.logit_attrs(stack[1], torch.tensor([3, 4])), attributed[1])


@pytest.mark.parametrize("component_axes", [(), (6,), (2, 3)])
def test_rows_and_positions_of_every_stack(cache, component_axes):
    stack = cache.get_full_resid_decomposition()[:6].unflatten(0, (2, 3))
    stack = {0: stack[0, 0], 1: stack.flatten(0, 1), 2: stack}[len(component_axes)]
    whole = cache.apply_ln_to_stack(stack)
    read = cache.apply_ln_to_stack
    assert_close(read(stack, batch_slice=1), whole[..., 1, :, :])
    assert_close(read(stack, batch_slice=[1]), whole[..., [1], :, :])
    assert_close(read(stack[..., 1, :, :], batch_slice=1, has_batch_dim=False), whole[..., 1, :, :])
    last = stack[..., -1, :]
    assert_close(read(last, pos_slice=-1), whole[..., -1, :])
    assert_close(read(last, pos_slice=-1, batch_slice=torch.tensor(0)), whole[..., 0, -1, :])
    assert_close(read(last[..., 0, :], pos_slice=-1, batch_slice=0, has_batch_dim=False), whole[..., 0, -1, :])
    for single in (cache.apply_slice_to_batch_dim([1]), cache.apply_slice_to_batch_dim(1)):
        row = stack[..., 1, :, :]
        assert_close(single.apply_ln_to_stack(row, has_batch_dim=False), whole[..., 1, :, :])
        assert_close(
            single.logit_attrs(row, 3, has_batch_dim=False), cache.logit_attrs(stack, torch.tensor([7, 3]))[..., 1, :]
        )


def test_whole_streams_get_the_bias(cache):
    streams = cache.stack_activation("resid_pre")
    read = cache.apply_ln_to_stack(streams, whole_streams=True)
    assert_close(read, cache.accumulated_resid(apply_ln=True)[:-1])
    bias = cache.weights.get("ln_final.b", torch.zeros(()))
    assert_close(cache.apply_ln_to_stack(streams) + bias, read)


def test_where_no_norm_reads_the_stream_it_is_as_it_is():
    _, cache = make_model("bare").run_with_cache(random_tokens(2, 5))
    stack = cache.decompose_resid(1)
    assert cache.apply_ln_to_stack(stack, 1, whole_streams=True).equal(stack)
    assert cache.apply_ln_to_stack(stack, 1, batch_slice=1).equal(stack[:, 1])


def test_what_does_not_fit_is_told_the_axes_that_were_expected():
    _, cache = make_model("rotary").run_with_cache(random_tokens(2, 5))
    stack = cache.decompose_resid()
    for wrong in (stack[:, :, :3], stack[0, 0], stack[:, 0], stack[..., :7], torch.zeros(12)):
        with pytest.raises(CacheError, match=r"pos axes \[2, 5\]; expected \[\*components, 2, 5, 12\] with any number"):
            cache.apply_ln_to_stack(wrong)
        with pytest.raises(CacheError, match=r"expected \[\*components, 2, 5, 12\]"):
            cache.logit_attrs(wrong, 3)
    with pytest.raises(CacheError, match=r"expected \[\*components, 2, 5, 12\].*has_batch_dim=False"):
        cache.apply_ln_to_stack(stack[:, 0], has_batch_dim=False)
    with pytest.raises(CacheError, match=r"batch_slice=1: the stack has shape \[5, 12\], without an axis of rows"):
        cache.apply_ln_to_stack(stack[0, 0], batch_slice=1)
    with pytest.raises(CacheError, match="batch_slice=0: this cache has no batch axis"):
        cache.apply_slice_to_batch_dim(0).apply_ln_to_stack(stack[:, 0], batch_slice=0)
    with unchecked(), pytest.raises(CacheError, match=r"shape \[\].*expected \[\*components, 2, 5, 12\]"):
        cache.apply_ln_to_stack(torch.tensor(1.0))
    for wrong, found in ((None, "a NoneType"), ([[1.0]], "a list"), (torch.zeros(2, 5, 12).long(), "torch.int64")):
        with unchecked(), pytest.raises(CacheError, match=f"residual_stack is {found}; expected a floating tensor"):
            cache.apply_ln_to_stack(wrong)
