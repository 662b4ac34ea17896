"""Adapters held against bases that they do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_adapter
from hooklens.adapters.choice import find_family
from hooklens.adapters.conversion import MemoryTensors
from hooklens.adapters.families import load_families
from hooklens.adapters.files.disk import DiskTensors, read_json
from hooklens.adapters.lora import BoundAdapter, bind_adapter
from hooklens.errors import CheckpointError
from tests.adapters.lora.made import Pair, make_pair
from tests.checkpoints import edit_config, load_apart


def bind(pair: Pair) -> BoundAdapter:
    config = read_json(pair.base / "config.json")
    family = find_family(config, load_families(), where="here")
    source = DiskTensors(pair.base)
    cfg = family.read_config(config, where="here")
    return bind_adapter(open_adapter(pair.adapter), family, cfg, source, where="here")


def test_names_are_those_on_disk_whatever_memory_calls_them(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt_neox", target_modules=["lm_head", "embed_out", "dense"])
    found = bind(pair)
    assert found.names() <= set(DiskTensors(pair.base).names())
    assert "embed_out.weight" in found.changes
    assert not found.in_memory


@pytest.mark.parametrize(("model", "turned"), [("gpt2", True), ("llama", False)])
def test_which_way_a_tensor_holds_its_map_is_the_familys(model: str, turned: bool, tmp_path: Path) -> None:
    """A square map has the right shape either way, and the setting in the file is not always right."""
    targets = {"gpt2": ["c_proj", "wte"], "llama": ["o_proj", "embed_tokens"]}[model]
    pair = make_pair(tmp_path, model, target_modules=targets, fan_in_fan_out=not turned)
    found = bind(pair)
    assert {change.turned for name, change in found.changes.items() if "embed" not in name and "wte" not in name} == {
        turned
    }
    assert all(change.turned for name, change in found.changes.items() if "embed" in name or "wte" in name)


def test_square_experts_are_the_way_that_transformers_says(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt_oss", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    for change in bind(pair).changes.values():
        assert change.turned
        assert (change.A.shape, change.B.shape) == ((4, 4, 32), (4, 32, 4))


def drop_layer(pair: Pair) -> None:
    state = load_apart(pair.base / "model.safetensors")
    save_file({name: one for name, one in state.items() if "layers.1." not in name}, pair.base / "model.safetensors")
    edit_config(pair.base, num_hidden_layers=1)


def rename(pair: Pair) -> None:
    state = load_apart(pair.adapter / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query"): one for name, one in state.items()}
    save_file(renamed, pair.adapter / "adapter_model.safetensors")


def resize(pair: Pair) -> None:
    state = load_apart(pair.adapter / "adapter_model.safetensors")
    grown = {name: torch.zeros(100, 32) if "lm_head" in name else one for name, one in state.items()}
    save_file(grown, pair.adapter / "adapter_model.safetensors")


def thin(pair: Pair) -> None:
    path = pair.adapter / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"r": 4', '"r": 5'), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (drop_layer, r"no tensor of the base is that of 'model\.layers\.1\.self_attn\.q_proj'"),
        (rename, r"is that of 'model\.layers\.0\.self_attn\.query', 'model\.layers\.1\.self_attn\.query'"),
        (resize, r"'lm_head\.weight' is \[100, 32\], and the base's \[97, 32\]"),
        (thin, r"q_proj': lora_A is \[4, 32\] and lora_B \[32, 4\], and the base's .* \[32, 32\], with rank 5"),
    ],
)
def test_what_does_not_fit_is_listed(spoil: Callable[[Pair], None], text: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    spoil(pair)
    with pytest.raises(
        CheckpointError, match=rf"the adapter does not fit .*base: .*{text}.*Take the base .* vocabulary may"
    ):
        HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)


def test_a_bias_of_its_own_needs_one_in_the_base(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match=r"lora_bias of 'model\.layers\.0.*q_proj': the base has no bias there"):
        HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)


def test_a_language_model_inside_of_another(tmp_path: Path) -> None:
    """Both the base's names and the adapter's have a segment that says so, or one of them has."""
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj", "lm_head", "embed_tokens"])
    config: dict[str, Any] = read_json(pair.base / "config.json")
    family = find_family(config, load_families(), where="here")
    cfg = family.read_config(config, where="here")
    inside = {
        name.replace("model.", "model.language_model."): one
        for name, one in load_apart(pair.base / "model.safetensors").items()
    }
    inside["model.vision_tower.weight"] = torch.ones(3)
    expected = bind(pair)
    found = bind_adapter(open_adapter(pair.adapter), family, cfg, MemoryTensors(inside), where="here")
    assert found.changes.keys() == expected.changes.keys()
    state = load_apart(pair.adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("model.model.", "model.model.language_model."): one for name, one in state.items()},
        pair.adapter / "adapter_model.safetensors",
    )
    found = bind_adapter(open_adapter(pair.adapter), family, cfg, MemoryTensors(inside), where="here")
    assert found.changes.keys() == expected.changes.keys()
    assert bind(pair).changes.keys() == expected.changes.keys()
