"""Reading the folders of adapters, wherever they lie, and finding the bases that they name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM, download, is_supported
from hooklens.adapters import open_adapter
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.errors import CheckpointError, InputError, UnsupportedModelError
from tests.adapters.lora.made import IDS, Pair, make_pair
from tests.checkpoints import load_apart


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, "llama", target_modules=["q_proj", "embed_tokens"])


def edit_adapter(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_apart(folder / "adapter_model.safetensors")
    edit(state)
    save_file(state, folder / "adapter_model.safetensors")


def names_of(adapter: Any) -> list[str]:
    return sorted(one.name for one in adapter.modules)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


_PROJECTION = "base_model.model.model.layers.0.self_attn.q_proj"


class TestReading:
    def test_files_in_pytorchs_format(self, pair: Pair) -> None:
        expected = names_of(open_adapter(pair.adapter))
        torch.save(load_apart(pair.adapter / "adapter_model.safetensors"), pair.adapter / "adapter_model.bin")
        (pair.adapter / "adapter_model.safetensors").unlink()
        assert names_of(open_adapter(pair.adapter)) == expected

    def test_a_trainers_folder(self, pair: Pair) -> None:
        """What a trainer leaves beside an adapter has the endings of old formats of checkpoints."""
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.ones(2)}, pair.adapter / name)
        torch.save({"lr": 1e-4}, pair.adapter / "training_args.bin")
        assert len(open_adapter(pair.adapter).modules) == 3
        with pytest.warns(UserWarning, match="is a PEFT adapter; its base"):
            HookedCausalLM.from_pretrained(pair.adapter)

    def test_on_any_file_system(self, pair: Pair) -> None:
        files = fsspec.filesystem("memory")
        for folder in pair:
            for path in folder.iterdir():
                files.pipe(f"/lora-{folder.name}/{path.name}", path.read_bytes())
        edit = json.loads(files.cat("/lora-adapter/adapter_config.json"))
        files.pipe(
            "/lora-adapter/adapter_config.json",
            json.dumps({**edit, "base_model_name_or_path": "memory://lora-base"}).encode(),
        )
        expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
        given = HookedCausalLM.from_pretrained("memory://lora-base", adapter="memory://lora-adapter")
        assert torch.equal(logits_of(given), expected)
        with pytest.warns(UserWarning, match="its base memory://lora-base is loaded"):
            found = HookedCausalLM.from_pretrained("memory://lora-adapter")
        assert torch.equal(logits_of(found), expected)

    @pytest.mark.parametrize(
        ("edit", "text"),
        [
            (lambda state: state.pop(next(name for name in state if "lora_B" in name)), "there is no lora_B"),
            (lambda state: state.update({"x.lora_A.weight": torch.ones(4, 2)}), "'x': there is no lora_B"),
            (
                lambda state: state.update({name: one[:3] for name, one in state.items() if "lora_A" in name}),
                r"lora_A is \[3, 32\] and lora_B \[32, 4\]; expected \[rank in\] and \[out rank\]",
            ),
            (lambda state: state.update({"x.lora_C": torch.ones(1)}), "'x.lora_C' has an unknown meaning"),
            (lambda state: state.update({"x.weight": torch.ones(1).int()}), "'x.weight' is int32"),
            (
                lambda state: state.update({f"{_PROJECTION}.lora_B.bias": torch.ones(5)}),
                r"its bias is \[5\]; expected \[32\]",
            ),
            (
                lambda state: state.update(
                    {f"{_PROJECTION}.lora_magnitude_vector": torch.ones(32)}
                ),
                "has a lora_magnitude_vector, and use_dora is false",
            ),
            (lambda state: state.clear(), "there are none"),
        ],
    )  # fmt: skip
    def test_tensors_that_do_not_fit_together(self, edit: Callable[..., Any], text: str, pair: Pair) -> None:
        edit_tensors(pair.adapter, edit)
        with pytest.raises(CheckpointError, match=f"tensors do not fit together: .*{text}"):
            open_adapter(pair.adapter)

    def test_lengths_that_are_missing(self, pair: Pair) -> None:
        edit_adapter(pair.adapter, use_dora=True)
        with pytest.raises(CheckpointError, match="has no lora_magnitude_vector, and use_dora is true"):
            open_adapter(pair.adapter)

    def test_a_folder_of_something_else(self, pair: Pair) -> None:
        with pytest.raises(CheckpointError, match=r"base: is no PEFT adapter; expected adapter_config\.json"):
            HookedCausalLM.from_pretrained(pair.base, adapter=pair.base)
        (pair.adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"or adapter_model\.bin, found .*adapter_config\.json"):
            open_adapter(pair.adapter)

    @pytest.mark.parametrize("given", [3, [], [3]])
    def test_arguments(self, given: Any, pair: Pair) -> None:
        with pytest.raises(InputError, match="adapter"):
            HookedCausalLM.from_pretrained(pair.base, adapter=given)


class TestBases:
    def test_a_folder_of_an_adapter_gives_its_base_with_it_merged(self, pair: Pair) -> None:
        expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
        with pytest.warns(
            UserWarning, match=r"adapter: is a PEFT adapter; its base .*base is loaded, with the adapter"
        ):
            found = HookedCausalLM.from_pretrained(pair.adapter)
        assert torch.equal(logits_of(found), expected)
        assert is_supported(pair.adapter)
        assert HookedCausalLM.from_config_of(pair.adapter).cfg == found.cfg
        assert download(pair.adapter) == pair.adapter

    def test_a_relative_path_is_one_from_the_adapter_where_there_is_none_from_here(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edit_adapter(pair.adapter, base_model_name_or_path="../base")
        expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
        for place in (Path("/"), pair.adapter):
            monkeypatch.chdir(place)
            with pytest.warns(UserWarning, match="is a PEFT adapter"):
                assert torch.equal(logits_of(HookedCausalLM.from_pretrained(pair.adapter)), expected)

    def test_its_tokenizer_goes_before_that_of_the_base(self, pair: Pair) -> None:
        build_tokenizer(n_ctx=20).save_pretrained(pair.base)
        build_tokenizer(n_ctx=30).save_pretrained(pair.adapter)
        with pytest.warns(UserWarning, match="is a PEFT adapter"):
            own: Any = HookedCausalLM.from_pretrained(pair.adapter).tokenizer
        of_base: Any = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter).tokenizer
        assert (own.model_max_length, of_base.model_max_length) == (30, 20)

    def test_a_base_that_is_not_named_or_not_there(self, pair: Pair) -> None:
        edit_adapter(pair.adapter, base_model_name_or_path=None)
        with pytest.raises(
            CheckpointError, match="does not say of which model; give that as source, and this as adapter"
        ):
            HookedCausalLM.from_pretrained(pair.adapter)
        edit_adapter(pair.adapter, base_model_name_or_path="./nowhere")
        with pytest.raises(
            CheckpointError, match=r"a PEFT adapter for './nowhere', which cannot be opened .*as source"
        ):
            HookedCausalLM.from_pretrained(pair.adapter)

    def test_a_base_that_is_an_adapter_too(self, pair: Pair) -> None:
        edit_adapter(pair.adapter, base_model_name_or_path=str(pair.adapter))
        with pytest.raises(UnsupportedModelError, match=r"whose base, .*, is one itself; give the model"):
            HookedCausalLM.from_pretrained(pair.adapter)

    def test_a_base_of_another_name_is_told_of(self, pair: Pair) -> None:
        edit_adapter(pair.adapter, base_model_name_or_path="owner/Something-7B")
        with pytest.warns(
            UserWarning, match="was made for 'owner/Something-7B' by its adapter_config.json, and is merged"
        ):
            HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
        # The same model in another place is the rule.
        edit_adapter(pair.adapter, base_model_name_or_path="/scratch/Base")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)

    def test_an_adapter_beside_a_model_is_merged_when_it_is_asked_for(self, pair: Pair) -> None:
        expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
        for path in pair.adapter.iterdir():
            (pair.base / path.name).write_bytes(path.read_bytes())
        assert torch.equal(logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.base)), expected)

    def test_processed_weights_are_no_base(self, pair: Pair, tmp_path: Path) -> None:
        base = make_pair(tmp_path / "other", "gpt2", target_modules=["c_attn"])
        HookedCausalLM.from_pretrained(base.base).process_weights(center_writing_weights=True).save_pretrained(
            tmp_path / "centred"
        )
        with pytest.raises(UnsupportedModelError, match=r"its weights were processed \(center_writing_weights\)"):
            HookedCausalLM.from_pretrained(tmp_path / "centred", adapter=base.adapter)

    def test_an_old_format_is_no_base(self, pair: Pair, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        torch.save(
            {"model": {"transformer.wte.weight": torch.ones(9, 4)}, "model_args": {}}, tmp_path / "old" / "ckpt.pt"
        )
        with pytest.raises(
            UnsupportedModelError, match="old: is in an old format, whose tensors do not have the names"
        ):
            HookedCausalLM.from_pretrained(tmp_path / "old", adapter=pair.adapter)


class FakeHub:
    """Stands for the hub: repositories that are folders, and a record of what was fetched of them."""

    def __init__(self, repositories: dict[str, Path], cache: Path) -> None:
        self.repositories, self.cache = repositories, cache
        self.fetched: list[tuple[str, str | None, str]] = []

    def snapshot_download(self, name: str, *, revision: Any, allow_patterns: list[str], **_: Any) -> str:
        from fnmatch import fnmatch

        folder = self.cache / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.repositories[name].iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                self.fetched.append((name, revision, path.name))
                (folder / path.name).write_bytes(path.read_bytes())
        return str(folder)

    def list_repo_files(self, name: str, **_: Any) -> list[str]:
        return [path.name for path in self.repositories[name].iterdir()]


class TestHub:
    @pytest.fixture
    def hub(self, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        fake = FakeHub({"owner/base": pair.base, "owner/adapter": pair.adapter}, tmp_path / "cache")
        edit_adapter(pair.adapter, base_model_name_or_path="owner/base", revision="v2")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda _, name, **__: fake.list_repo_files(name))
        return fake

    def test_both_are_fetched(self, hub: FakeHub, pair: Pair) -> None:
        expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
        with pytest.warns(UserWarning, match="owner/adapter: is a PEFT adapter; its base owner/base at revision 'v2'"):
            found = HookedCausalLM.from_pretrained("owner/adapter")
        assert torch.equal(logits_of(found), expected)
        assert ("owner/base", "v2", "model.safetensors") in hub.fetched
        given = HookedCausalLM.from_pretrained("owner/base", adapter="owner/adapter", revision="v1")
        assert torch.equal(logits_of(given), expected)
        assert ("owner/base", "v1", "model.safetensors") in hub.fetched

    def test_a_download_takes_the_base_along(self, hub: FakeHub) -> None:
        folder = download("owner/adapter")
        assert (folder / "adapter_model.safetensors").is_file()
        assert ("owner/base", "v2", "model.safetensors") in hub.fetched

    def test_of_an_adapter_that_cannot_be_merged_no_weight_is_fetched(self, hub: FakeHub, pair: Pair) -> None:
        edit_adapter(pair.adapter, peft_type="IA3")
        for load in (HookedCausalLM.from_pretrained, download):
            with pytest.raises(UnsupportedModelError, match="type 'IA3'"):
                load("owner/adapter")
        assert not [name for _, _, name in hub.fetched if name.endswith(".safetensors")]
