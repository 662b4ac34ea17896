"""The view as a data set of Hugging Face's `datasets`."""

import pickle

import pytest
import torch

from hooklens.datasets import ActivationDataset, record
from hooklens.errors import HookNameError
from tests.datasets.test_recording import MODEL, make_documents, record_small

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_small(tmp_path_factory.mktemp("set") / "acts")


def test_rows_are_the_tokens(recorded):
    view = recorded.to_hf()
    assert isinstance(view, datasets.Dataset)
    assert len(view) == len(recorded)
    rows = view[3:9]
    assert rows["token"] == recorded.tokens()[3:9].tolist()
    assert rows["document"] == recorded.documents()[3:9].tolist()
    assert rows["position"] == recorded.positions()[3:9].tolist()
    for name in recorded.sites:
        assert torch.equal(rows[name], recorded.site(name)[3:9])
        assert torch.equal(view[5][name], recorded.site(name)[5])
        assert torch.equal(view[-1][name], recorded.site(name)[-1])


def test_what_moves_rows_moves_their_activations(recorded):
    name = recorded.sites[1]
    view = recorded.to_hf(["blocks.0.attn.hook_z"])
    assert name == "blocks.0.attn.hook_z"
    mixed = view.shuffle(seed=3).filter(lambda position: position > 1, input_columns="position").select(range(20))
    rows = mixed[:]
    assert len(set(rows["index"])) == 20
    assert rows["index"] != sorted(rows["index"])
    assert torch.equal(rows[name], recorded.site(name)[rows["index"]])
    assert min(rows["position"]) > 1
    parts = view.train_test_split(0.25, seed=0)
    assert torch.equal(parts["test"][:][name], recorded.site(name)[parts["test"][:]["index"]])


def test_columns_alone(recorded):
    view = recorded.to_hf().select_columns(["token"])
    assert view[:4] == {"token": recorded.tokens()[:4].tolist()}


def test_it_travels_and_feeds_loaders(recorded):
    name = recorded.sites[0]
    view = pickle.loads(pickle.dumps(recorded.to_hf([name])))
    assert torch.equal(view[2][name], recorded.site(name)[2])
    loader = torch.utils.data.DataLoader(view, batch_size=8, num_workers=2)
    found = torch.cat([batch[name] for batch in loader])
    assert torch.equal(found, recorded.site(name)[:])


def test_a_site_that_is_not_there(recorded):
    with pytest.raises(HookNameError, match="was not recorded"):
        recorded.to_hf(["blocks.0.hook_mlp_out"])


@pytest.mark.parametrize("streamed", [False, True])
def test_corpora_of_the_package_are_read(tmp_path, streamed, recorded):
    corpus = datasets.Dataset.from_dict({"input_ids": make_documents()})
    if streamed:
        corpus = corpus.to_iterable_dataset()
    found = record(
        MODEL, corpus, ["resid_post", "z", "hook_embed"], tmp_path / "set", batch_tokens=40, row_length=16,
        shard_bytes=4000, progress=False,
    )  # fmt: skip
    assert found.manifest == recorded.manifest
    assert isinstance(found, ActivationDataset)
