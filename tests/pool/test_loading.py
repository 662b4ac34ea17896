"""Tests of hooklens.pool.loading, through `load_model`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hooklens import HookedCausalLM
from hooklens.errors import CheckpointError, InputError
from hooklens.pool import CausalLMPool, PoolError, register_target
from hooklens.pool.config import targets
from tests.checkpoints import build_variant, save_variant

TOKENS = torch.arange(6)[None]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_registered", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_variant("llama-gqa", tmp_path_factory.mktemp("llama")))


def check_both(entry: Any, folder: str, **options: Any) -> None:
    """An entry gives the checkpoint's model, hooked and not."""
    pool = CausalLMPool({"a": entry})
    hooked, plain = pool.load_model("a", **options), pool.load_model("a", hooked=False, **options)
    assert type(hooked) is HookedCausalLM
    assert isinstance(plain, PreTrainedModel)
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    assert torch.equal(plain(TOKENS).logits, expected)
    # Sums of float32 in another order.
    torch.testing.assert_close(hooked(TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target",
    [
        None,
        "transformers.AutoModelForCausalLM",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "transformers.LlamaForCausalLM.from_pretrained",
        "fusion_bench.models.modeling_deepseek_v2.DeepseekV2ForCausalLM.from_pretrained",
        "hooklens.HookedCausalLM",
        "hooklens.HookedCausalLM.from_pretrained",
    ],
)
def test_every_spelling_of_a_mapping(folder: str, target: str | None) -> None:
    """In FusionBench `transformers.AutoModelForCausalLM`, as its documentation has it, raised an OSError."""
    entry = {"pretrained_model_name_or_path": folder}
    check_both(entry if target is None else {"_target_": target, **entry}, folder)
    if target is not None and target.startswith("hooklens."):
        check_both({"_target_": target, "source": folder}, folder)


def test_paths(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_both(folder, folder)
    check_both(Path(folder), folder)
    monkeypatch.chdir(Path(folder).parent)
    check_both(Path(folder).name, folder)
    monkeypatch.setenv("HOME", str(Path(folder).parent))
    pool = CausalLMPool({"a": f"~/{Path(folder).name}"})
    assert torch.equal(pool.load_model("a")(TOKENS), pool.load_model(folder)(TOKENS))


def test_models_in_memory(folder: str) -> None:
    """In FusionBench a model given to a pool could not be loaded from it."""
    for model in (HookedCausalLM.from_pretrained(folder), build_variant("llama-gqa")):
        check_both(model, folder)
        pool = CausalLMPool([model])
        for hooked in (True, False):
            loaded = pool.load_model("0", hooked=hooked)
            with torch.no_grad():
                for parameter in loaded.parameters():
                    parameter.zero_()
        check_both(model, folder)
        half = pool.load_model("0", dtype="bf16", device="cpu")
        assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
        assert {one.dtype for one in model.parameters()} == {torch.float32}
        with pytest.raises(InputError, match=r"models\.0 is a model in memory, which takes dtype and device only"):
            pool.load_model("0", n_ctx=4)
    # The pool's arguments are those of loading, and say nothing about what is loaded already.
    pool = CausalLMPool({"a": HookedCausalLM.from_pretrained(folder)}, model_kwargs={"dtype": "float64", "n_ctx": 4})
    assert pool.load_model("a").embed.W_E.dtype == torch.float32


def test_registered_functions(folder: str) -> None:
    calls = []

    def load(path: str, *, torch_dtype: Any = None, scale: float = 1.0, extra: Any = None, kind: Any) -> Any:
        calls.append((path, torch_dtype, scale, extra))
        return kind.from_pretrained(path)

    register_target("mine.load", load)
    register_target("mine.scale", lambda by: 2.0 * by)
    for kind in (HookedCausalLM, AutoModelForCausalLM):
        entry = {
            "_target_": "mine.load",
            "path": folder,
            "scale": {"_target_": "mine.scale", "by": 3},
            "extra": [{"x": {"_target_": "transformers.AutoTokenizer", "pretrained_model_name_or_path": TOKENIZER}}],
        }
        check_both({**entry, "kind": kind.__new__(kind)}, folder)
        pool = CausalLMPool({"a": {**entry, "kind": kind.__new__(kind)}}, model_kwargs={"torch_dtype": "bf16"})
        pool.load_model("a", scale=1.0)
        path, dtype, scale, extra = calls[-1]
        assert (path, dtype, scale) == (folder, torch.bfloat16, 1.0)
        assert extra[0]["x"]("the store")["input_ids"]
        assert calls[-2][2] == 6.0


TOKENIZER = "bundled:tiny-llama"


def test_a_function_that_gives_no_model() -> None:
    register_target("mine.load", lambda: "model")
    with pytest.raises(PoolError, match=r"models.a: its function gave 'model', expected a HookedCausalLM or"):
        CausalLMPool({"a": {"_target_": "mine.load"}}).load_model("a")


def test_adapters_are_loaded_by_their_function(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = ModuleType("hooklens.pool.peft")

    def load_peft_causal_lm(
        base_model_path: str,
        peft_model_path: str,
        torch_dtype: Any = "bfloat16",
        is_trainable: bool = True,
        merge_and_unload: bool = False,
        *,
        hooked: bool = True,
    ) -> Any:
        calls.append((base_model_path, peft_model_path, torch_dtype, is_trainable, merge_and_unload, hooked))
        return HookedCausalLM.from_pretrained(folder)

    monkeypatch.setattr(module, "load_peft_causal_lm", load_peft_causal_lm, raising=False)
    monkeypatch.setitem(sys.modules, "hooklens.pool.peft", module)
    for name in ("fusion_bench.modelpool.causal_lm.load_peft_causal_lm", "hooklens.pool.load_peft_causal_lm"):
        entry = {"_target_": name, "base_model_path": "b", "peft_model_path": "p", "merge_and_unload": True}
        pool = CausalLMPool({"a": entry}, model_kwargs={"torch_dtype": "float16"})
        assert isinstance(pool.load_model("a"), HookedCausalLM)
        assert calls[-1] == ("b", "p", torch.float16, True, True, True)
        assert isinstance(pool.load_model("a", hooked=False, dtype="float32", is_trainable=False), PreTrainedModel)
        assert calls[-1] == ("b", "p", torch.float32, False, True, False)
        with pytest.raises(InputError, match="load_peft_causal_lm takes no layers"):
            pool.load_model("a", layers=[0])
        with pytest.raises(PoolError, match=r"models.a is made by 'fusion_bench|models.a is made by 'hooklens"):
            pool.get_model_path("a")


def test_a_class_that_transformers_does_not_have(folder: str) -> None:
    pool = CausalLMPool({"a": {"_target_": "transformers.NoSuchForCausalLM", "source": folder}})
    with pytest.raises(PoolError, match=r"models.a: transformers has no class 'NoSuchForCausalLM'"):
        pool.load_model("a", hooked=False)


def test_the_class_of_a_mapping_is_that_of_the_model(folder: str) -> None:
    entry = {"_target_": "transformers.LlamaForCausalLM", "pretrained_model_name_or_path": folder}
    assert type(CausalLMPool({"a": entry}).load_model("a", hooked=False)) is LlamaForCausalLM


def test_arguments_of_both_libraries(folder: str) -> None:
    pool = CausalLMPool({"a": folder}, model_kwargs={"torch_dtype": "bfloat16", "low_cpu_mem_usage": True})
    hooked = pool.load_model("a", n_ctx=8, layers=[1, 0], device_map="cpu")
    assert (hooked.cfg.n_ctx, hooked.cfg.n_layers, hooked.embed.W_E.dtype) == (8, 2, torch.bfloat16)
    plain = pool.load_model("a", hooked=False, attn_implementation="eager", device="cpu")
    assert (plain.config._attn_implementation, plain.dtype) == ("eager", torch.bfloat16)
    with pytest.raises(InputError, match="attn_implementation='eager': a hooked model attends"):
        pool.load_model("a", attn_implementation="eager")
    with pytest.raises(InputError, match=r"models.a: transformers has no layers"):
        pool.load_model("a", hooked=False, layers=[0])


def test_a_model_without_tokenizer_gets_the_pools(folder: str) -> None:
    pool = CausalLMPool({"a": folder, "own": TOKENIZER}, tokenizer=TOKENIZER)
    assert pool.load_model("a").tokenizer("the store")["input_ids"]
    assert CausalLMPool({"a": folder}).load_model("a").tokenizer is None
    mine = pool.load_tokenizer()
    assert pool.load_model("a", tokenizer=mine).tokenizer is mine
    broken = CausalLMPool({"a": folder, "own": TOKENIZER}, tokenizer="/nowhere")
    assert broken.load_model("own").tokenizer is not None
    with pytest.raises(PoolError, match=r"a: has no tokenizer, and the pool's fails: .*Give tokenizer= to the call"):
        broken.load_model("a")


def test_errors_of_loading_come_through(tmp_path: Path) -> None:
    pool = CausalLMPool({"a": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match="no such folder"):
        pool.load_model("a")
