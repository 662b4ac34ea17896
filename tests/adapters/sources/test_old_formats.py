"""Checkpoints in old formats of the field, from every source that checkpoints come from."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import fsspec
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import hooklens
from hooklens import HookedCausalLM
from hooklens.adapters.sources import FsspecRepository
from hooklens.errors import CheckpointError, InputError, UnsupportedModelError
from tests.adapters.formats import test_meta as meta
from tests.adapters.formats import test_nanogpt as nanogpt
from tests.adapters.formats import test_transformer_lens as transformer_lens
from tests.checkpoints import save_variant

NAME = "owner/name"
URL = "memory://bucket/model"


class Hub:
    """Stands for the hub: one repository with the files of a folder, and a record of what was asked."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.listings, self.is_down = files, cache, 0, False

    def snapshot_download(self, name, *, revision, cache_dir, local_files_only, allow_patterns, token) -> str:
        assert (name, revision) == (NAME, "v1")
        is_asked = not local_files_only and not self.is_down
        if is_asked:
            for file in self.names():
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(self.files / file, self.cache / file)
        if not is_asked and not self.cache.exists():
            raise errors.LocalEntryNotFoundError("nothing in the cache")
        return str(self.cache)

    def list_repo_files(self, name, *, revision, token) -> list[str]:
        assert (name, revision) == (NAME, "v1")
        self.listings += 1
        if self.is_down:
            raise RuntimeError("whatever the client of the network raises")
        return self.names()

    def names(self) -> list[str]:
        return [path.relative_to(self.files).as_posix() for path in self.files.rglob("*") if path.is_file()]

    def fetched(self) -> set[str]:
        return {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    (tmp_path / "files").mkdir()
    fake = Hub(tmp_path / "files", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda _, *given, **options: fake.list_repo_files(*given, **options)
    )
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def upload(tmp_path):
    """Puts the files of `files` where `URL` is."""
    memory = fsspec.filesystem("memory")

    def put() -> None:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        for path in (tmp_path / "files").rglob("*"):
            if path.is_file():
                memory.pipe_file(f"{URL}/{path.relative_to(tmp_path / 'files').as_posix()}", path.read_bytes())

    yield put
    memory.store.clear()


def save_transformer_lens(folder: Path) -> None:
    """Final weights, and those of earlier in training below them, with the step as their unembedding's bias."""
    (folder / "checkpoints").mkdir()
    state = transformer_lens.make_state(transformer_lens.CONFIG)
    transformer_lens.save(folder, transformer_lens.CONFIG, state)
    for step in (100, 2100):
        torch.save(
            {**state, "unembed.b_U": torch.full((31,), float(step))}, folder / f"checkpoints/SoLU_2L_{step:09}.pth"
        )


def save_nanogpt(folder: Path) -> None:
    nanogpt.save(folder / "ckpt.pt", nanogpt.state_of(nanogpt.build()))


def save_meta(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(meta.PARAMS))
    torch.save(meta.make_state(meta.PARAMS), folder / "consolidated.00.pth")


FORMATS: dict[str, tuple[Callable[[Path], None], set[str], set[str]]] = {
    # What the network is told by, and what the weights are read from.
    "TransformerLens": (save_transformer_lens, {"config.json"}, {"config.json", "model_final.pth"}),
    "nanoGPT": (save_nanogpt, {"ckpt.pt"}, {"ckpt.pt"}),
    "Meta": (save_meta, {"params.json"}, {"params.json", "consolidated.00.pth"}),
}


def check_same(model: HookedCausalLM, folder: Path) -> None:
    expected = HookedCausalLM.from_pretrained(folder)
    assert model.cfg == expected.cfg
    theirs = expected.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", FORMATS)
def test_the_hub(hub, name) -> None:
    """No `.pth` was fetched: the toy models of the field did not load by their names."""
    save, telling, read = FORMATS[name]
    save(hub.files)
    for other in ("modeling_evil.py", "README.md", "optimizer.pth.tmp"):
        (hub.files / other).write_text("")
    assert hooklens.is_supported(NAME, revision="v1")
    assert HookedCausalLM.from_config_of(NAME, revision="v1").cfg.n_layers == 2
    assert hub.fetched() == telling
    check_same(HookedCausalLM.from_pretrained(NAME, revision="v1"), hub.files)
    assert hub.fetched() == read


@pytest.mark.parametrize("name", FORMATS)
def test_downloads(hub, name) -> None:
    save, _, read = FORMATS[name]
    save(hub.files)
    (hub.files / "generation_config.json").write_text("{}")
    assert hooklens.download(NAME, revision="v1") == hub.cache
    assert hub.fetched() == {*read, "generation_config.json"}
    hub.is_down = True
    for options in ({}, {"local_files_only": True}):
        check_same(HookedCausalLM.from_pretrained(NAME, revision="v1", **options), hub.files)


@pytest.mark.parametrize("name", FORMATS)
def test_urls_and_repositories(upload, tmp_path, name) -> None:
    (tmp_path / "files").mkdir()
    FORMATS[name][0](tmp_path / "files")
    upload()
    assert hooklens.is_supported(URL)
    check_same(HookedCausalLM.from_pretrained(URL), tmp_path / "files")
    check_same(
        HookedCausalLM.from_pretrained(FsspecRepository("memory://bucket"), subfolder="model"), tmp_path / "files"
    )
    with pytest.raises(InputError, match=rf"{URL}: is read where it lies, and no copy is kept"):
        hooklens.download(URL)


@pytest.mark.parametrize("where", ["folder", "hub", "url"])
def test_weights_of_earlier_in_training(hub, upload, where) -> None:
    """A step is chosen by the end of a file's name, as numbers are: 100 is not 2100."""
    save_transformer_lens(hub.files)
    upload()
    source, options = {"folder": (hub.files, {}), "hub": (NAME, {"revision": "v1"}), "url": (URL, {})}[where]
    file = "checkpoints/SoLU_2L_000002100.pth"
    by_file = (source, {"subfolder": file}) if where == "hub" else (f"{source}/{file}", {})
    for (at, chosen), step in (
        ((source, {"variant": "100"}), 100),
        ((source, {"variant": "000002100"}), 2100),
        ((source, {"subfolder": file}), 2100),
        (by_file, 2100),
    ):
        model = HookedCausalLM.from_pretrained(at, **options, **chosen)
        assert model.b_U.unique().tolist() == [step]
    final = HookedCausalLM.from_pretrained(source, **options, variant="final")
    assert len(final.b_U.unique()) > 1
    with pytest.raises(CheckpointError, match=r"holds .*'checkpoints/SoLU_2L_000000100.pth'.*ends with '300'"):
        HookedCausalLM.from_pretrained(source, **options, variant="300")


def test_nothing_of_weights_that_cannot_be_loaded(hub) -> None:
    save_transformer_lens(hub.files)
    (hub.files / "config.json").write_text(json.dumps({**transformer_lens.CONFIG, "load_in_4bit": True}))
    with pytest.raises(UnsupportedModelError, match="load_in_4bit is True"):
        HookedCausalLM.from_pretrained(NAME, revision="v1")
    assert hub.fetched() == {"config.json"}


def test_metas_files_beside_the_hubs(hub) -> None:
    save_variant("llama-gqa", hub.files)
    (hub.files / "original").mkdir()
    save_meta(hub.files / "original")
    assert HookedCausalLM.from_pretrained(NAME, revision="v1").cfg.n_layers == 3
    # Listing is asked for only where the config is not in the hub's words.
    assert hub.listings == 0
    inside = HookedCausalLM.from_pretrained(NAME, revision="v1", subfolder="original")
    check_same(inside, hub.files / "original")


@pytest.mark.parametrize("where", ["hub", "url"])
def test_what_is_missing_or_does_not_go(hub, upload, where) -> None:
    save_transformer_lens(hub.files)
    shutil.rmtree(hub.files / "checkpoints")
    (hub.files / "model_final.pth").rename(hub.files / "model_1.pth")
    shutil.copy(hub.files / "model_1.pth", hub.files / "model_2.pth")
    (hub.files / "run").mkdir()
    save_nanogpt(hub.files / "run")
    upload()
    source, options = {"hub": (NAME, {"revision": "v1"}), "url": (URL, {})}[where]
    with pytest.raises(
        CheckpointError, match=rf"^{source}.*: holds .*'model_1.pth', 'model_2.pth'.*; expected one .pth"
    ):
        HookedCausalLM.from_pretrained(source, **options)
    with pytest.raises(InputError, match=r"variant='fp16' does not go with this source: .*old format"):
        HookedCausalLM.from_pretrained(source, **options, subfolder="run", variant="fp16")
    with pytest.raises(CheckpointError, match=r"run/model.pth"):
        HookedCausalLM.from_pretrained(source, **options, subfolder="run/model.pth")


def test_the_hub_that_cannot_be_reached(hub) -> None:
    save_transformer_lens(hub.files)
    hub.is_down = True
    with pytest.raises(CheckpointError, match=f"'{NAME}' at revision 'v1': .*not downloaded before"):
        HookedCausalLM.from_pretrained(NAME, revision="v1")
