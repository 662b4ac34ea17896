"""Models in memory with adapters inside of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hooklens import HookedCausalLM
from hooklens.errors import CheckpointError, UnsupportedModelError
from tests.adapters.families.checks import load_reference
from tests.adapters.lora.made import IDS, adapt, save_base

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused heads": ("gpt_neox", {"target_modules": "all-linear"}),
    "DoRA, saved whole": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    "tied embedding": ("llama tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "[in, out], biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "experts, router": (
        "qwen3_moe",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        },
    ),
    "square experts": ("gpt_oss", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
}


def make(folder: Path, model: str = "llama", **lora: Any) -> Any:
    return adapt(load_reference(save_base(folder, model), torch.float32), **{"target_modules": ["q_proj"], **lora})


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_it_is_merged_into_a_copy(case: str, tmp_path: Path) -> None:
    model, lora = CASES[case]
    adapted = make(tmp_path, model, **lora)
    before = {name: one.clone() for name, one in adapted.state_dict().items()}
    expected = logits_of(adapted)
    # Through another sum than with the adapter apart.
    found = HookedCausalLM.from_hf(adapted)
    torch.testing.assert_close(logits_of(found), expected, rtol=0, atol=1e-5)
    theirs = {one.untyped_storage().data_ptr() for one in adapted.state_dict().values()}
    assert not theirs & {one.untyped_storage().data_ptr() for one in found.parameters()}
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert all(torch.equal(one, before[name]) for name, one in adapted.state_dict().items())
    assert torch.equal(logits_of(adapted), expected)


def test_in_what_only_runs_it(tmp_path: Path) -> None:
    adapted = make(tmp_path)
    expected = logits_of(HookedCausalLM.from_hf(adapted))
    assert torch.equal(logits_of(HookedCausalLM.from_hf(nn.DataParallel(adapted))), expected)


def test_adapters_that_act_together(tmp_path: Path) -> None:
    adapted = adapt(make(tmp_path), name="other", seed=4, target_modules=["q_proj", "up_proj"], r=2)
    adapted.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits_of(HookedCausalLM.from_hf(adapted)), logits_of(adapted), rtol=0, atol=1e-5)


def test_the_adapter_that_is_chosen(tmp_path: Path) -> None:
    adapted = adapt(make(tmp_path), name="other", seed=4, target_modules=["q_proj"])
    found = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        found[name] = logits_of(HookedCausalLM.from_hf(adapted))
        torch.testing.assert_close(found[name], logits_of(adapted), rtol=0, atol=1e-5)
    assert not torch.allclose(found["default"], found["other"])


def test_adapters_that_are_switched_off(tmp_path: Path) -> None:
    adapted = make(tmp_path, modules_to_save=["lm_head"])
    adapted.base_model.disable_adapter_layers()
    expected = logits_of(load_reference(tmp_path, torch.float32))
    torch.testing.assert_close(logits_of(HookedCausalLM.from_hf(adapted)), expected, rtol=0, atol=1e-5)


def test_merged_already(tmp_path: Path) -> None:
    """The change would be in the weights, and be added to them a second time."""
    adapted = make(tmp_path)
    expected = logits_of(HookedCausalLM.from_hf(adapted))
    adapted.merge_adapter()
    with pytest.raises(CheckpointError, match=r"merged into the weights already \(\['default'\]\); .*unmerge_adapter"):
        HookedCausalLM.from_hf(adapted)
    torch.testing.assert_close(logits_of(HookedCausalLM.from_hf(adapted.merge_and_unload())), expected)


def test_a_scale_that_was_changed(tmp_path: Path) -> None:
    adapted = make(tmp_path)
    adapted.base_model.model.model.layers[1].self_attn.q_proj.set_scale("default", 0.5)
    with pytest.raises(
        UnsupportedModelError, match=r"in 1 modules its scale is not .*'model\.layers\.1\.self_attn\.q_"
    ):
        HookedCausalLM.from_hf(adapted)


def test_an_adapter_of_another_type(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_reference(save_base(tmp_path, "llama"), torch.float32), config)
    with pytest.raises(UnsupportedModelError, match=r"adapter 'default': is a PEFT adapter of type 'IA3'"):
        HookedCausalLM.from_hf(adapted)
