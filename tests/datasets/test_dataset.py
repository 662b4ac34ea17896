import pickle

import pytest
import torch

from hooklens.datasets import ActivationDataset, SiteStatistics
from hooklens.errors import CheckpointError, HookNameError, InputError
from tests.datasets.test_recording import NAMES, make_documents, record_small

STREAM = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_small(tmp_path_factory.mktemp("recorded") / "set")


@pytest.fixture(scope="module")
def whole(recorded):
    """All tokens of a site, put together file by file."""
    return torch.cat([recorded.shard(number)[STREAM] for number in range(len(recorded.manifest.shards))])


@pytest.mark.parametrize(
    "index",
    [0, -1, 77, slice(3, 9), slice(60, 140), slice(None), slice(200, 20, -7), [150, 3, 3, -2], torch.tensor([9])],
)
def test_tokens_by_number(recorded, whole, index):
    expected = whole[list(range(len(whole))[index])] if isinstance(index, slice) else whole[index]
    assert torch.equal(recorded.site(STREAM)[index], expected)
    assert torch.equal(recorded[index][STREAM], expected)
    assert list(recorded[index]) == recorded.sites
    assert recorded.site(STREAM).shape == (len(whole), 12)


def test_what_is_not_there(recorded):
    with pytest.raises(InputError, match=rf"out of range; there are {len(recorded)} tokens"):
        recorded.site(STREAM)[len(recorded)]
    with pytest.raises(HookNameError, match="was not recorded"):
        recorded.site("blocks.1.hook_resid_pre")


def test_slices_are_views_of_the_mapped_file(recorded):
    part = recorded.site(STREAM)[0:4]
    assert part.untyped_storage().data_ptr() == recorded.shard(0)[STREAM].untyped_storage().data_ptr()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_token_comes_once_in_another_order_each_time(recorded, whole, workers):
    loader = recorded.loader(7, sites=[STREAM], buffer=50, seed=3, workers=workers)
    epochs = [torch.cat([batch[STREAM] for batch in loader]) for _ in range(2)]
    again = torch.cat(
        [batch[STREAM] for batch in recorded.loader(7, sites=[STREAM], buffer=50, seed=3, workers=workers)]
    )
    assert torch.equal(again, epochs[0])
    for one in epochs:
        assert not torch.equal(one, whole)
        assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, whole.tolist()))
    # Workers, which are made anew for every epoch, gave the same order each time.
    assert not torch.equal(*epochs)


def test_batches_in_the_order_of_the_corpus(recorded, whole):
    batches = list(recorded.loader(10, shuffle=False))
    assert all(len(batch[STREAM]) == 10 for batch in batches[:-1])
    assert torch.equal(torch.cat([batch[STREAM] for batch in batches]), whole)
    full = list(recorded.loader(10, shuffle=False, drop_last=True))
    assert len(full) == len(whole) // 10


def test_batches_mix_documents(recorded):
    """A batch of neighbours would teach an autoencoder one document at a time."""
    order = {tuple(row): index for index, row in enumerate(recorded.site(STREAM)[:].tolist())}
    first = next(iter(recorded.loader(32, sites=[STREAM], buffer=200, seed=1)))[STREAM]
    found = {int(recorded.documents(order[tuple(row)])) for row in first.tolist()}
    assert len(found) > 5


def test_statistics(recorded, whole):
    found = recorded.statistics(STREAM)
    assert isinstance(found, SiteStatistics)
    # float64 sums of some hundred numbers.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.mean, whole.mean(0), **close)
    torch.testing.assert_close(found.variance, whole.var(0), **close)
    torch.testing.assert_close(found.covariance, torch.cov(whole.T), **close)
    assert found.mean_norm == pytest.approx(float(whole.norm(dim=-1).mean()), rel=1e-12)
    assert found.rms_norm == pytest.approx(float(whole.square().sum(-1).mean().sqrt()), rel=1e-12)
    of_heads = recorded.statistics("blocks.0.attn.hook_z", covariance=False)
    assert of_heads.mean.shape == (4, 6)
    assert of_heads.covariance is None
    torch.testing.assert_close(of_heads.variance, recorded.site("blocks.0.attn.hook_z")[:].var(0), **close)


def test_statistics_of_large_means_lose_nothing(tmp_path):
    """The difference of two large sums of squares has no digits left."""
    from hooklens.datasets.statistics import StatisticsSum

    values = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e8
    total = StatisticsSum(covariance=True)
    for part in values.split(37):
        total.add(part)
    torch.testing.assert_close(total.finish((3,)).covariance, torch.cov(values.T), rtol=1e-6, atol=1e-6)


def test_shows_what_it_holds(recorded):
    assert repr(recorded).splitlines()[0].startswith(f"ActivationDataset({len(recorded):,} tokens, 5 sites,")
    assert len(repr(recorded).splitlines()) <= 20
    table = recorded.to_dataframe()
    assert list(table.columns) == ["token", "document", "position"]
    assert table["token"].tolist() == [token for document in make_documents() for token in document]


def test_travels_to_other_processes(recorded):
    recorded.site(STREAM)[0]
    assert torch.equal(pickle.loads(pickle.dumps(recorded)).site(STREAM)[5], recorded.site(STREAM)[5])


def test_damage_is_found(tmp_path):
    found = record_small(tmp_path / "set")
    found.verify()
    path = tmp_path / "set" / found.manifest.shards[1].name
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"\['shard-00001.safetensors'\] are not what was written"):
        ActivationDataset(tmp_path / "set").verify()
    path.write_bytes(contents[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        ActivationDataset(tmp_path / "set").site(NAMES[0])[:]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['shard-00001.safetensors'\]"):
        ActivationDataset(tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    for text, told in (
        ("{", "not JSON"),
        ("{}", "lacks or misnames"),
        ('{"format": "other"}', "its format is 'other'"),
    ):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=told):
            ActivationDataset(tmp_path / "set")
    with pytest.raises(CheckpointError, match="holds no activation data set"):
        ActivationDataset(tmp_path)
