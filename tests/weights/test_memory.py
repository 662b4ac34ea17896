"""Tests of hooklens.weights.memory."""

import copy
import gc
import mmap

import pytest
import torch

from hooklens.weights import memory
from hooklens.weights.memory import HUGE_PAGE, empty_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (700, 801), (2, 1024, 1024), (5, 1000, 513)])
def test_an_ordinary_tensor(shape, dtype):
    made = empty_pages(shape, dtype)
    assert (made.shape, made.dtype, made.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert made.untyped_storage().nbytes() == made.nbytes
    values = torch.randn(shape).to(dtype)
    made.copy_(values)
    assert torch.equal(made, values)
    assert torch.equal(copy.deepcopy(made), values)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a matter of Linux")
def test_a_large_one_starts_at_a_page():
    assert empty_pages((1000, 1000), torch.float32).data_ptr() % HUGE_PAGE == 0


def test_memory_lives_as_long_as_a_view_of_it():
    made = empty_pages((1024, 1024), torch.float32).fill_(3.0)
    row = torch.nn.Parameter(made)[7].detach()
    del made
    gc.collect()
    assert torch.equal(row, torch.full((1024,), 3.0))


def test_without_large_pages(monkeypatch):
    """A system or a kernel that has none."""

    class Refusing(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    values = torch.randn(1024, 1024)
    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert torch.equal(empty_pages(values.shape, values.dtype).copy_(values), values)
    monkeypatch.setattr(memory, "_ADVICE", None)
    assert torch.equal(empty_pages(values.shape, values.dtype).copy_(values), values)
