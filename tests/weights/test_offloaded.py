"""Tests of hooklens.weights.offloaded: tensors that are read where they lie, brought where they compute, and kept."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hooklens.errors import InputError
from hooklens.weights.offloaded import OffloadedTensor, is_offloaded, lies_on_disk, offload, values_of
from tests.pretended_devices import FIRST, SECOND, pretending

CPU = torch.device("cpu")


@pytest.fixture
def values():
    return torch.arange(12, dtype=torch.float64).reshape(3, 4)


@pytest.fixture
def weight(values):
    return offload(values, CPU, "disk")


def test_it_says_what_the_values_say(weight, values):
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.stride()) == (values.shape, values.dtype, values.stride())
    assert (weight.device, weight.requires_grad, weight.is_leaf) == (CPU, False, True)
    assert is_offloaded(weight)
    assert lies_on_disk(weight)
    assert not lies_on_disk(offload(values, FIRST, "cpu"))
    assert values_of(weight).data_ptr() == values.data_ptr()
    assert values_of(values) is values
    assert "lies='disk'" in repr(weight)


def test_what_is_computed_from_it_is_plain(weight, values):
    for made, expected in (
        (weight * 2, values * 2),
        (torch.cat([weight, weight]), torch.cat([values, values])),
        (weight.float(), values.float()),
        (weight.sum(), values.sum()),
        (torch.ones(3, dtype=torch.float64) @ weight, values.sum(0)),
    ):
        assert type(made) is torch.Tensor
        assert torch.equal(made, expected)
    assert weight[1, 2].item() == 6.0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[1:, ::2],
        lambda x: x.unflatten(1, (2, 2)).permute(1, 0, 2),
        lambda x: x.detach(),
        lambda x: x.data,
        lambda x: x.split(2)[1],
        lambda x: x.view(torch.int64),
    ],
)
def test_views_lie_where_it_lies(view, weight, values):
    seen = view(weight)
    assert lies_on_disk(seen)
    assert values_of(seen).untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert seen.stride() == view(values).stride()
    assert torch.equal(seen, view(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.T.add_(1),
        lambda x: x[0].zero_(),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.copy_(torch.zeros(3, 4)),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_mul_([x], 2),
        lambda x: torch.optim.SGD([x], lr=1.0).param_groups[0]["params"][0].sub_(1),
        nn.init.zeros_,
    ],
)
def test_it_is_not_changed(change, weight, values):
    before = values.clone()
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"on the disk \(offloaded\), where it is read and not changed"),
    ):
        change(weight)
    assert torch.equal(values, before)


def test_it_is_not_trained(weight):
    for ask in (weight.requires_grad_, lambda: setattr(weight, "requires_grad", True)):
        with pytest.raises(InputError, match="is not trained; gradients of activations go through it"):
            ask()
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    (x @ weight).sum().backward()
    assert torch.equal(x.grad, values_of(weight).sum(1).expand(2, 3))
    assert weight.grad is None


def test_copies_share_it_and_pickles_hold_its_values(weight, values):
    module = nn.Linear(4, 3, bias=False)
    module._parameters["weight"] = weight
    copied = copy.deepcopy(module)
    assert copied.weight is not weight
    assert isinstance(copied.weight, nn.Parameter)
    assert lies_on_disk(copied.weight)
    assert values_of(copied.weight).data_ptr() == values.data_ptr()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for read in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(module))):
        assert type(read.weight) is nn.Parameter
        assert read.weight.requires_grad
        assert torch.equal(read.weight, values)
        assert read.weight.data_ptr() != values.data_ptr()
    assert type(pickle.loads(pickle.dumps(weight.T))) is torch.Tensor


def test_arrays_of_it_cannot_be_written_to(weight, values):
    array = weight.numpy()
    assert array.tolist() == weight.tolist() == values.tolist()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 5.0
    assert weight.data_ptr() == values.data_ptr()


def test_it_is_brought_to_its_device(values):
    with pretending():
        weight, x = offload(values, FIRST, "cpu"), torch.ones(2, 3, dtype=torch.float64).to(FIRST)
        assert weight.device == FIRST
        made = x @ weight
        assert made.device == FIRST
        assert torch.equal(made.cpu(), torch.ones(2, 3, dtype=torch.float64) @ values)
        assert weight.to("cpu").device == CPU
        assert torch.equal(weight.to("cpu"), values)
        assert weight.to(SECOND).device == SECOND
        assert weight.T.device == FIRST
        with pytest.raises(RuntimeError, match="on the same device"):
            x.to(SECOND) @ weight


def test_of_a_table_only_the_rows_that_are_looked_up_are_brought(monkeypatch, values):
    """The embedding of a large vocabulary is not copied to the accelerator for a call of a few tokens."""

    def bring(tensor):
        raise AssertionError("all of it was brought")

    monkeypatch.setattr(OffloadedTensor, "bring", bring)
    with pretending():
        table = offload(values, FIRST, "disk")
        found = nn.functional.embedding(torch.tensor([[2, 0]]).to(FIRST), table)
        assert found.device == FIRST
        assert torch.equal(found.cpu(), values[torch.tensor([[2, 0]])])
