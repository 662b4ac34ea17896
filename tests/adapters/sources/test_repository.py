"""Checkpoints on file systems that are no folders, read by ranges."""

import json
import warnings
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from hooklens import HookedCausalLM, download, is_supported
from hooklens.adapters import open_checkpoint
from hooklens.adapters.sources import FsspecRepository, RepositoryFiles, open_files
from hooklens.errors import CheckpointError, InputError, MissingDependencyError
from tests.checkpoints import save_variant

URL = "memory://bucket/model"


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def upload(memory, folder: Path, url: str = URL) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


class Counting:
    """A repository that counts the bytes it gives."""

    def __init__(self, inside) -> None:
        self.inside, self.moved = inside, {}

    def __str__(self) -> str:
        return "counted"

    def names(self):
        return self.inside.names()

    def read(self, name, start=0, stop=None):
        content = self.inside.read(name, start, stop)
        self.moved[name] = self.moved.get(name, 0) + len(content)
        return content


@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_url_gives_the_model_of_the_folder(memory, tmp_path, max_shard_size, dtype) -> None:
    upload(memory, save_variant("llama-gqa", tmp_path, dtype=dtype, max_shard_size=max_shard_size))
    remote, local = HookedCausalLM.from_pretrained(URL), HookedCausalLM.from_pretrained(tmp_path)
    assert remote.cfg == local.cfg
    theirs = local.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in remote.state_dict().items())
    assert is_supported(URL)


def test_pickles_too(memory, tmp_path) -> None:
    save_variant("neox-parallel", tmp_path)
    expected = dict(open_checkpoint(tmp_path).tensors())
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    upload(memory, tmp_path)
    found = dict(open_checkpoint(URL).tensors())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_layer_moves_only_its_bytes(memory, tmp_path) -> None:
    folder = save_variant("llama-gqa", tmp_path)
    upload(memory, folder)
    counting = Counting(FsspecRepository(URL))
    model = HookedCausalLM.from_pretrained(counting, layers=[1])
    file = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    kept = sum(parameter.nbytes for parameter in model.parameters())
    # The embedding is read a second time where the config leaves the dtype to it, which it does not.
    assert counting.moved["model.safetensors"] == header + kept
    assert kept < 0.6 * len(file)


def test_no_weight_is_read_of_what_is_not_supported(memory, tmp_path) -> None:
    upload(memory, save_variant("llama-gqa", tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    memory.pipe_file(f"{URL}/config.json", json.dumps({**config, "hidden_act": "snake"}).encode())
    counting = Counting(FsspecRepository(URL))
    assert not is_supported(counting)
    assert set(counting.moved) == {"config.json"}


def test_subfolder_and_variant(memory, tmp_path) -> None:
    folder = save_variant("llama-gqa", tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    upload(memory, folder, f"{URL}/inner")
    assert HookedCausalLM.from_pretrained(URL, subfolder="inner", variant="fp16").cfg.n_layers == 3
    assert HookedCausalLM.from_pretrained(folder, variant="fp16").cfg.n_layers == 3
    with pytest.raises(CheckpointError, match="memory://bucket/model/inner: holds no weights"):
        HookedCausalLM.from_pretrained(URL, subfolder="inner")
    with pytest.raises(CheckpointError, match=r"holds no weights of variant 'bf16' \(model.bf16.safetensors\)"):
        HookedCausalLM.from_pretrained(folder, variant="bf16")


class TestDamage:
    def refuse(self, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            HookedCausalLM.from_pretrained(URL)

    def test_nothing_there(self, memory) -> None:
        self.refuse("memory://bucket/model: no such folder")

    def test_no_config(self, memory) -> None:
        memory.pipe_file(f"{URL}/model.safetensors", b"")
        self.refuse("memory://bucket/model: holds no config.json; expected that and weights, found 'model.safetensors'")

    @pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -1000])
    def test_a_file_cut_off(self, memory, tmp_path, length) -> None:
        upload(memory, save_variant("llama-gqa", tmp_path))
        memory.pipe_file(f"{URL}/model.safetensors", (tmp_path / "model.safetensors").read_bytes()[:length])
        self.refuse("model.safetensors: (gave .* bytes|is no safetensors file)")

    @pytest.mark.parametrize(
        "content", [b"<html>", b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a": 1}', b"\xff" * 64]
    )
    def test_something_else(self, memory, tmp_path, content) -> None:
        upload(memory, save_variant("llama-gqa", tmp_path))
        memory.pipe_file(f"{URL}/model.safetensors", content)
        self.refuse("model.safetensors: ")

    def test_an_index_of_files_that_are_not_there(self, memory, tmp_path) -> None:
        upload(memory, save_variant("llama-gqa", tmp_path, max_shard_size="30KB"))
        second = sorted(tmp_path.glob("model-00002-*"))[0].name
        memory.rm(f"{URL}/{second}")
        self.refuse(f"names files that are not there: '{second}'")

    @pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../../secret"}])
    def test_an_index_that_is_none(self, memory, tmp_path, weight_map) -> None:
        save_variant("llama-gqa", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        upload(memory, tmp_path)
        self.refuse("index.json: ")

    def test_a_name_outside_of_the_repository(self, memory, tmp_path) -> None:
        class Escaping(Counting):
            def names(self):
                return [*self.inside.names(), "tokenizer/../../escaped.json"]

        upload(memory, save_variant("llama-gqa", tmp_path))
        with pytest.raises(CheckpointError, match="lists a file outside of itself"):
            RepositoryFiles(Escaping(FsspecRepository(URL))).folder()


class TestOptions:
    @pytest.mark.parametrize(
        "option", [{"revision": "v1"}, {"cache_dir": "c"}, {"local_files_only": True}, {"token": "x"}]
    )
    def test_options_of_the_hub_are_refused_for_a_url(self, option) -> None:
        with pytest.raises(InputError, match="does not go with this source: it is a URL"):
            open_files(URL, **option)

    def test_the_token_is_not_shown(self) -> None:
        with pytest.raises(InputError) as caught:
            open_files(URL, token="very-secret")
        assert "very-secret" not in str(caught.value)

    def test_storage_options_are_refused_for_a_folder(self, tmp_path) -> None:
        with pytest.raises(InputError, match="it is no URL"):
            HookedCausalLM.from_pretrained(tmp_path, storage_options={"anon": True})

    def test_storage_options_reach_the_file_system(self, monkeypatch) -> None:
        seen = {}

        class Fake(fsspec.AbstractFileSystem):
            protocol = "fake"

            def __init__(self, **options) -> None:
                super().__init__()
                seen.update(options)

            def find(self, path, **_) -> list[str]:
                return [f"{path}/config.json"]

        fsspec.register_implementation("fake", Fake, clobber=True)
        open_files("fake://bucket", storage_options={"key": "k"})
        assert seen["key"] == "k"

    def test_a_file_system_that_is_not_there(self) -> None:
        with pytest.raises(
            CheckpointError, match=r"nosuch://bucket: cannot be opened \(ValueError: Protocol not known"
        ):
            open_files("nosuch://bucket")

    def test_the_package_of_a_file_system(self) -> None:
        try:
            import s3fs  # noqa: F401
        except ImportError:
            with pytest.raises(MissingDependencyError, match=r"s3://bucket: .*s3fs"):
                open_files("s3://bucket")

    def test_no_copy_is_kept_of_a_url(self, memory, tmp_path) -> None:
        upload(memory, save_variant("llama-gqa", tmp_path))
        with pytest.raises(InputError, match="no copy is kept"):
            download(URL)


class TestConfigAlone:
    def test_no_memory_on_meta(self, tmp_path) -> None:
        model = HookedCausalLM.from_config_of(save_variant("llama-gqa", tmp_path), dtype=torch.bfloat16)
        assert model.device.type == "meta"
        assert model.dtype == torch.bfloat16
        assert model.cfg == open_checkpoint(tmp_path).cfg

    def test_fresh_weights(self, tmp_path) -> None:
        save_variant("llama-gqa", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        ids = torch.arange(6)[None]
        one, same, other = (HookedCausalLM.from_config_of(tmp_path, device="cpu", seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one(ids), same(ids))
        assert not torch.equal(one(ids), other(ids))
        assert one(ids).isfinite().all()
        assert HookedCausalLM.from_config_of(tmp_path, layers=[0, 2], n_ctx=9).cfg.n_ctx == 9

    def test_a_config_with_unknown_keys_warns_once(self, tmp_path) -> None:
        from tests.checkpoints import edit_config

        edit_config(save_variant("llama-gqa", tmp_path), n_loops=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            HookedCausalLM.from_pretrained(tmp_path)
        assert len([one for one in caught if "n_loops" in str(one.message)]) == 1
