"""Data sets at URLs, on fsspec's file system in memory, against the same ones in a folder."""

import pickle

import fsspec
import pytest
import torch

from hooklens.datasets import ActivationDataset
from hooklens.datasets.folder import RemoteFolder, open_folder
from hooklens.errors import CheckpointError, InputError
from tests.annotations import unchecked
from tests.datasets.test_recording import contents_of, make_documents, record_small

URL = "memory://bucket/acts"


@pytest.fixture
def files():
    """The file system, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def contents_at(files):
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.find("/bucket/acts")}


class StopsAfter:
    """Documents, and then what a user does who presses a key."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        yield from make_documents()[: self.n]
        raise KeyboardInterrupt


def test_a_url_holds_byte_for_byte_what_a_folder_holds(files, tmp_path):
    record_small(tmp_path / "set")
    found = record_small(URL)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir() if path.suffix != ".lock"}
    assert len(expected) > 3
    assert contents_at(files) == expected
    local = ActivationDataset(tmp_path / "set")
    assert found.folder == URL
    assert URL in repr(found)
    assert torch.equal(found.tokens(), local.tokens())
    for site in local.sites:
        assert torch.equal(found.site(site)[:], local.site(site)[:])
    found.verify()


def test_an_interrupted_one_goes_on_and_a_complete_one_runs_nothing(files):
    record_small(URL)
    whole = contents_at(files)
    files.store.clear()
    with pytest.raises(KeyboardInterrupt):
        record_small(URL, StopsAfter(len(make_documents()) - 2))
    assert not ActivationDataset(URL).is_complete
    record_small(URL)
    assert contents_at(files) == whole

    class Unread:
        def __iter__(self):
            raise AssertionError("the corpus was read")

    assert record_small(URL, Unread()).is_complete


def test_another_machine_that_writes_there_is_noticed(files):
    """No lock reaches other machines; a manifest of somebody else's must not be written over."""
    other = b"theirs"

    class Disturbed:
        def __iter__(self):
            for number, document in enumerate(make_documents()):
                if number == len(make_documents()) - 1:
                    files.pipe_file("/bucket/acts/manifest.json", other)
                yield document

    with pytest.raises(CheckpointError, match="changed by another process, which records there, too"):
        record_small(URL, Disturbed())
    assert files.cat_file("/bucket/acts/manifest.json") == other


def test_two_on_this_machine(files):
    class Nested:
        def __iter__(self):
            with pytest.raises(CheckpointError, match=f"another process is recording into {URL}"):
                record_small(URL)
            yield from make_documents()

    assert record_small(URL, Nested()).is_complete


def test_a_failed_upload_keeps_what_was_written(files, tmp_path, monkeypatch):
    put = type(files).put_file

    def fail_at_third(self, local, remote, **options):
        if remote.endswith("shard-00002.safetensors"):
            raise RuntimeError("the connection was reset")
        put(self, local, remote, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", fail_at_third)
        with pytest.raises(CheckpointError, match="the connection was reset; 2 shards with"):
            record_small(URL)
    assert len(ActivationDataset(URL).manifest.shards) == 2
    record_small(URL)
    found = contents_at(files)
    files.store.clear()
    record_small(URL)
    assert contents_at(files) == found


def test_files_are_kept_where_one_says(files, tmp_path):
    record_small(URL, shard_bytes=500, batch_tokens=16)
    kept = ActivationDataset(URL, cache_dir=tmp_path)
    values = kept.site(kept.sites[0])[:].clone()
    names = [f"{shard.sha256[:32]}-{shard.name}" for shard in kept.manifest.shards]
    assert len(names) > 8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    # What is here is not downloaded again.
    files.get_file = None
    try:
        again = ActivationDataset(URL, cache_dir=tmp_path)
        assert torch.equal(again.site(again.sites[0])[:], values)
    finally:
        del files.get_file


def test_data_sets_share_a_folder_of_downloads(files, tmp_path):
    """A file was found by its name, which all data sets have: a second one gave the first one's activations."""
    first = record_small(URL)
    other = record_small("memory://bucket/other", make_documents()[::-1])
    name = first.sites[0]
    expected = [found.site(name)[:].clone() for found in (first, other)]
    assert not torch.equal(*expected)
    for url, values in zip((URL, "memory://bucket/other"), expected, strict=True):
        assert torch.equal(ActivationDataset(url, cache_dir=tmp_path).site(name)[:], values)
    # One that is recorded anew at the same place has files of the same names, too.
    files.store.clear()
    record_small(URL, make_documents()[::-1])
    assert torch.equal(ActivationDataset(URL, cache_dir=tmp_path).site(name)[:], expected[1])


def test_a_file_system_without_folders(files, monkeypatch):
    """S3 has names alone: a folder without files could not be listed, so that nothing could be recorded there."""
    ls = type(files).ls

    def list_names(self, path, detail=True, **options):
        if not any(name.startswith(f"/{path.strip('/')}/") for name in self.store):
            raise FileNotFoundError(path)
        return ls(self, path, detail=detail, **options)

    monkeypatch.setattr(type(files), "makedirs", lambda self, path, exist_ok=False: None)
    monkeypatch.setattr(type(files), "ls", list_names)
    assert record_small(URL).is_complete


def test_few_files_are_kept_where_nobody_says_and_none_when_it_is_gone(files):
    record_small(URL, shard_bytes=500, batch_tokens=16)
    found = ActivationDataset(URL)
    first = found[0]
    whole = {name: found.site(name)[:] for name in found.sites}
    here = found._folder._here
    assert 0 < len(list(here.iterdir())) <= 8
    # Mapped files are read on, also when their names are gone.
    assert all(torch.equal(found[0][name], first[name]) for name in found.sites)
    travelled = pickle.loads(pickle.dumps(found))
    assert all(torch.equal(travelled.site(name)[:], whole[name]) for name in found.sites)
    del found
    assert not here.exists()


def test_loaders_read_from_a_url(files):
    found = record_small(URL, shard_bytes=500, batch_tokens=16)
    seen = torch.cat([batch[found.sites[0]] for batch in found.loader(7, seed=1)])
    assert torch.equal(
        seen.flatten(1).sum(1).sort().values, found.site(found.sites[0])[:].flatten(1).sum(1).sort().values
    )


def test_what_cannot_be_opened(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere://x: cannot be opened \(ValueError"):
        ActivationDataset("nowhere://x")
    with pytest.raises(CheckpointError, match=f"{URL} holds no activation data set"):
        ActivationDataset(URL)
    files.pipe_file("/bucket/acts", b"a file")
    with pytest.raises(CheckpointError, match="it is no folder"):
        record_small(URL)
    files.store.clear()
    files.pipe_file("/bucket/acts/notes.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"it holds \['notes.txt'\]"):
        record_small(URL)
    for option in ({"storage_options": {"key": 1}}, {"cache_dir": tmp_path}):
        with unchecked(), pytest.raises(InputError, match="is for a URL"):
            open_folder(str(tmp_path), what="out", **option)
    with unchecked(), pytest.raises(InputError, match="storage_options is 'secret', expected what the file system"):
        open_folder(URL, what="out", storage_options="secret")
    assert isinstance(open_folder(URL, what="out"), RemoteFolder)


def test_a_damaged_download_is_told(files):
    record_small(URL)
    name = "shard-00000.safetensors"
    files.pipe_file(f"/bucket/acts/{name}", files.cat_file(f"/bucket/acts/{name}")[:-7])
    found = ActivationDataset(URL)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        found[0]
    with pytest.raises(CheckpointError, match="are not what was written"):
        found.verify()
    files.rm(f"/bucket/acts/{name}")
    with pytest.raises(CheckpointError, match="lacks"):
        ActivationDataset(URL)


def test_contents_do_not_depend_on_the_folder(tmp_path):
    """A control of the comparison above."""
    record_small(tmp_path / "one")
    record_small(tmp_path / "other", make_documents()[:-1])
    assert contents_of(tmp_path / "one") != contents_of(tmp_path / "other")
