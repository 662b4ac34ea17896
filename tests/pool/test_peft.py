"""Bases with adapters by FusionBench's arguments, held against PEFT."""

from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.pool import CausalLMPool, load_peft_causal_lm
from tests.adapters.lora.made import IDS, Pair, load_adapted, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", target_modules="all-linear")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("as_text", [True, False])
def test_merged(pair: Pair, as_text: bool) -> None:
    base, adapter = map(str, pair) if as_text else pair
    found = load_peft_causal_lm(base, adapter, "fp32", merge_and_unload=True)
    assert isinstance(found, HookedCausalLM)
    assert found.dtype == torch.float32
    torch.testing.assert_close(logits_of(found), logits_of(load_adapted(pair, torch.float32)), rtol=0, atol=1e-5)
    assert all(one.requires_grad for one in found.parameters())


def test_bfloat16_where_nothing_is_said(pair: Pair) -> None:
    assert load_peft_causal_lm(str(pair.base), str(pair.adapter), merge_and_unload=True).dtype == torch.bfloat16


def test_not_trainable(pair: Pair) -> None:
    found = load_peft_causal_lm(pair.base, pair.adapter, "auto", False, True)
    assert not any(one.requires_grad for one in found.parameters())


def test_pefts_own(pair: Pair) -> None:
    peft = pytest.importorskip("peft")
    apart = load_peft_causal_lm(pair.base, pair.adapter, torch_dtype=torch.float32, hooked=False)
    assert isinstance(apart, peft.PeftModel)
    assert any(one.requires_grad for one in apart.parameters())
    merged = load_peft_causal_lm(pair.base, pair.adapter, "float32", merge_and_unload=True, hooked=False)
    assert not isinstance(merged, peft.PeftModel)
    torch.testing.assert_close(logits_of(merged), logits_of(apart.eval()), rtol=0, atol=1e-5)


def test_from_a_pool(pair: Pair) -> None:
    entry = {
        "_target_": "fusion_bench.modelpool.causal_lm.load_peft_causal_lm",
        "base_model_path": str(pair.base),
        "peft_model_path": str(pair.adapter),
        "merge_and_unload": True,
    }
    pool = CausalLMPool({"tuned": entry}, tokenizer=None, model_kwargs={"torch_dtype": "float32"})
    expected = logits_of(load_adapted(pair, torch.float32))
    torch.testing.assert_close(logits_of(pool.load_model("tuned")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(pool.load_model("tuned", hooked=False)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"base_model_path": 3},
        {"peft_model_path": ""},
        {"torch_dtype": "int8"},
        {"is_trainable": 1},
        {"merge_and_unload": None},
        {"hooked": "no"},
    ],
)
def test_arguments(given: dict[str, Any], pair: Pair) -> None:
    with pytest.raises(InputError, match=next(iter(given))):
        load_peft_causal_lm(**{"base_model_path": pair.base, "peft_model_path": pair.adapter, **given})
