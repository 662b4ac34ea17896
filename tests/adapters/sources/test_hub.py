import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from hooklens import HookedCausalLM, download, is_supported
from hooklens.errors import CheckpointError, UnsupportedModelError
from tests.checkpoints import save_variant

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class FakeHub:
    """Stands for `snapshot_download`: a repository of some files, and a record of what was asked."""

    def __init__(self, folder: Path, files: list[str], error: Exception | None = None) -> None:
        self.folder, self.files, self.error, self.calls = folder, files, error, []
        self.config = CONFIG

    def __call__(self, name, *, revision, cache_dir, local_files_only, allow_patterns, token):
        from fnmatch import fnmatch

        if self.error is not None:
            raise self.error
        self.calls.append((name, revision, cache_dir, local_files_only, token))
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                path = self.folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(self.config) if path.name == "config.json" else "")
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
    assert download("owner/name", revision="v1", cache_dir="cache", token="secret") == fake.folder
    assert set(fake.calls) == {("owner/name", "v1", Path("cache"), False, "secret")}
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
    download("owner/name")
    assert "pytorch_model.bin" in found(fake)
    assert "consolidated.safetensors" not in found(fake)


def test_nothing_is_fetched_of_what_cannot_be_loaded(install) -> None:
    """Weights of any size were downloaded before the config said that nothing could be done with them."""
    fake = install(REPOSITORY)
    fake.config = {**CONFIG, "model_type": "mamba"}
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported"):
        download("owner/name")
    assert found(fake) == {"config.json"}
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported"):
        HookedCausalLM.from_pretrained("owner/name")
    assert "pytorch_model.bin" not in found(fake)


def test_whether_a_model_is_supported_is_told_by_its_config_alone(install) -> None:
    fake = install(REPOSITORY)
    assert is_supported("owner/name")
    assert HookedCausalLM.from_config_of("owner/name").cfg.n_layers == 2
    assert found(fake) == {"config.json"}
    fake.config = {**CONFIG, "hidden_act": "snake"}
    assert not is_supported("owner/name")


def test_a_variant_in_a_subfolder(install) -> None:
    files = ["config.json", "model.safetensors", "model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors"]
    fake = install([*files, *(f"inner/{name}" for name in files)])
    assert download("owner/name", subfolder="inner", variant="fp16") == fake.folder / "inner"
    assert {str(path.relative_to(fake.folder)) for path in fake.folder.rglob("*.*")} == {
        "inner/config.json",
        "inner/model.fp16.safetensors",
        "inner/model.fp16-00001-of-00001.safetensors",
    }


def test_a_folder_is_taken_as_it_is(install, tmp_path, monkeypatch) -> None:
    fake = install(error=AssertionError("the hub was asked"))
    save_variant("llama-gqa", tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert download("owner/name") == Path("owner/name")
    assert download(tmp_path / "owner/name") == tmp_path / "owner/name"
    assert fake.calls == []


@pytest.mark.parametrize("source", ["./owner/name", "/nowhere/at/all", "a/b/c", "~/nothing-here", Path("owner/name")])
def test_a_path_that_is_not_there_never_reaches_the_hub(source, install) -> None:
    install(error=AssertionError("the hub was asked"))
    with pytest.raises(CheckpointError, match="no such folder; expected a checkpoint folder or a hub name"):
        download(source)


def test_a_file_is_not_a_folder(tmp_path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a file; expected the folder"):
        download(tmp_path / "model.safetensors")


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
        download("owner/name", revision="v2")
