"""Batches one after another, their random numbers, and the place in them."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from hooklens.errors import CheckpointError
from hooklens.training.data import DataStream, place_from_plain, place_to_plain


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()])


def make_stream(**options) -> DataStream:
    return DataStream(DataLoader(Numbers(), batch_size=2, shuffle=True, **options), digests=True)


def test_what_happens_between_batches_changes_none_of_them() -> None:
    """Dropout drew from the generator that shuffles and augments: data depended on the model."""
    plain, disturbed = make_stream(), make_stream()
    for stream in (plain, disturbed):
        stream.seed(3)
    for _ in range(7):
        torch.rand(5)
        np.random.seed(1)
        before = torch.get_rng_state(), random.getstate()
        assert torch.equal(disturbed.read(), plain.read())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]


@pytest.mark.parametrize("n_read", range(9))
def test_a_place_is_returned_to(n_read) -> None:
    """Before the first batch, within an epoch, and at its end."""
    stream = make_stream()
    stream.seed(4)
    for _ in range(n_read):
        stream.read()
    place = place_from_plain(place_to_plain(stream.place()))
    other = make_stream()
    other.go_to(place, progress=False)
    assert other.place()["digest"] == stream.place()["digest"]
    for _ in range(7):
        assert torch.equal(stream.read(), other.read())


def test_generators_of_samplers_are_put_back() -> None:
    def make(seed):
        sampler = RandomSampler(range(6), replacement=True, generator=torch.Generator().manual_seed(seed))
        return DataStream(DataLoader(range(6), batch_size=2, sampler=sampler), digests=True)

    stream, other = make(1), make(2)
    for one in (stream, other):
        one.seed(0)
    for _ in range(4):
        stream.read()
    other.go_to(stream.place(), progress=False)
    assert torch.equal(torch.cat([stream.read() for _ in range(6)]), torch.cat([other.read() for _ in range(6)]))


def test_epochs_are_told() -> None:
    class ByEpoch(list):
        def set_epoch(self, epoch):
            self[:] = [torch.tensor([epoch, index]) for index in range(2)]

    stream = DataStream(ByEpoch([0, 0]), digests=True)
    stream.seed(0)
    assert [stream.read().tolist() for _ in range(5)] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    other = DataStream(ByEpoch([0, 0]), digests=True)
    other.go_to(stream.place(), progress=False)
    assert other.read().tolist() == [2, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {**batch, "x": batch["x"] + 1},
        lambda batch: {**batch, "x": batch["x"].double()},
        lambda batch: {**batch, "x": batch["x"][None]},
        lambda batch: {"y": batch["y"], "x": batch["x"]},
        lambda batch: {**batch, "y": [batch["y"][0], 3.0]},
        lambda batch: {**batch, "y": [np.ones(3), "text"]},
    ],
)
def test_the_digest_sees_every_entry(change) -> None:
    def make(change=lambda batch: batch):
        batch = {"x": torch.ones(2), "y": [np.ones(2), "text"]}
        stream = DataStream([change(batch)] * 3, digests=True)
        stream.seed(0)
        return stream

    stream = make()
    stream.read()
    make().go_to(stream.place(), progress=False)
    with pytest.raises(CheckpointError, match="the data gives other batches"):
        make(change).go_to(stream.place(), progress=False)
