from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from hooklens.adapters.hub import find_folder
from hooklens.errors import CheckpointError


class FakeHub:
    """Stands for `snapshot_download`: a repository of some files, and a record of what was asked."""

    def __init__(self, folder: Path, files: list[str], error: Exception | None = None) -> None:
        self.folder, self.files, self.error, self.calls = folder, files, error, []

    def __call__(self, name, *, revision, cache_dir, local_files_only, allow_patterns):
        from fnmatch import fnmatch

        if self.error is not None:
            raise self.error
        self.calls.append((name, revision, cache_dir, local_files_only))
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                path = self.folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        return str(self.folder)


@pytest.fixture
def install(monkeypatch, tmp_path):
    def make(files=(), error=None) -> FakeHub:
        (tmp_path / "snapshot").mkdir()
        fake = FakeHub(tmp_path / "snapshot", list(files), error)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return make


REPOSITORY = [
    "config.json",
    "generation_config.json",
    "hooklens.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "modeling_evil.py",
    "README.md",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "original/model.pth",
]


def found(fake: FakeHub) -> set[str]:
    return {path.name for path in fake.folder.rglob("*") if path.is_file()}


def test_safetensors_are_fetched_and_nothing_that_runs(install) -> None:
    fake = install([*REPOSITORY, "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
    assert find_folder("owner/name", revision="v1", cache_dir="cache", local_files_only=True) == fake.folder
    assert fake.calls == [("owner/name", "v1", "cache", True)]
    # The record of weight processing was not fetched, so processed weights counted as plain ones.
    assert found(fake) == {
        "config.json",
        "generation_config.json",
        "hooklens.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_pickles_are_fetched_where_there_are_no_safetensors(install) -> None:
    fake = install(REPOSITORY)
    find_folder("owner/name")
    assert "pytorch_model.bin" in found(fake)
    assert "consolidated.safetensors" not in found(fake)
    assert len(fake.calls) == 2


def test_a_folder_is_taken_as_it_is(install, tmp_path, monkeypatch) -> None:
    fake = install(error=AssertionError("the hub was asked"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == Path("owner/name")
    assert find_folder(tmp_path / "owner") == tmp_path / "owner"
    assert fake.calls == []


@pytest.mark.parametrize("source", ["./owner/name", "/nowhere/at/all", "a/b/c", "~/nothing-here", Path("owner/name")])
def test_a_path_that_is_not_there_never_reaches_the_hub(source, install) -> None:
    install(error=AssertionError("the hub was asked"))
    with pytest.raises(CheckpointError, match="no such folder; expected a checkpoint folder or a hub name"):
        find_folder(source)


def test_a_file_is_not_a_folder(tmp_path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a file; expected the folder"):
        find_folder(tmp_path / "model.safetensors")


def _http_error(kind: type[Exception]) -> Exception:
    """The error without the response of a server that its constructor asks for."""
    return kind.__new__(kind, "no")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_http_error(errors.RepositoryNotFoundError), "neither a local folder nor a repository on the hub"),
        (_http_error(errors.GatedRepoError), "the repository is gated; accept its terms"),
        (_http_error(errors.RevisionNotFoundError), "has no such revision"),
        (errors.HFValidationError("bad name"), r"nor a possible hub name \(bad name\)"),
        (errors.LocalEntryNotFoundError("offline"), "not downloaded before"),
        (ConnectionError("reset"), r"the download failed \(reset\)"),
    ],
)
def test_what_the_hub_says_becomes_one_of_our_errors(error, said, install) -> None:
    install(error=error)
    with pytest.raises(CheckpointError, match=f"'owner/name' at revision 'v2': .*{said}"):
        find_folder("owner/name", revision="v2")
