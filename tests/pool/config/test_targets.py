"""Tests of hooklens.pool.config.targets."""

import pytest
import transformers

from hooklens.pool import PoolError, register_target
from hooklens.pool.config import targets
from hooklens.pool.config.targets import check_targets, find_target, join_problems


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_registered", {})


@pytest.mark.parametrize(
    ("name", "kind", "class_name"),
    [
        ("transformers.AutoModelForCausalLM", "checkpoint", "AutoModelForCausalLM"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "checkpoint", "AutoModelForCausalLM"),
        ("transformers.LlamaForCausalLM.from_pretrained", "checkpoint", "LlamaForCausalLM"),
        ("transformers.models.llama.modeling_llama.LlamaForCausalLM", "checkpoint", "LlamaForCausalLM"),
        ("transformers.GPT2LMHeadModel", "checkpoint", "GPT2LMHeadModel"),
        (
            "fusion_bench.models.modeling_deepseek_v2.DeepseekV2ForCausalLM.from_pretrained",
            "checkpoint",
            "AutoModelForCausalLM",
        ),
        ("hooklens.HookedCausalLM", "checkpoint", "AutoModelForCausalLM"),
        ("hooklens.HookedCausalLM.from_pretrained", "checkpoint", "AutoModelForCausalLM"),
        ("transformers.AutoTokenizer", "tokenizer", "AutoTokenizer"),
        ("transformers.AutoTokenizer.from_pretrained", "tokenizer", "AutoTokenizer"),
        ("transformers.PreTrainedTokenizerFast.from_pretrained", "tokenizer", "PreTrainedTokenizerFast"),
    ],
)
def test_names_of_transformers(name: str, kind: str, class_name: str) -> None:
    target = find_target(name, place="models.a._target_")
    assert (target.kind, target.class_name) == (kind, class_name)
    assert hasattr(transformers, class_name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fusion_bench.modelpool.CausalLMPool", "pool"),
        ("fusion_bench.CausalLMPool", "pool"),
        ("hooklens.pool.ModelPool", "pool"),
        ("fusion_bench.modelpool.causal_lm.CausalLMBackbonePool", "backbone_pool"),
        ("fusion_bench.modelpool.causal_lm.load_peft_causal_lm", "adapter"),
        ("fusion_bench.modelpool.causal_lm.causal_lm.load_peft_causal_lm", "adapter"),
        ("hooklens.pool.load_peft_causal_lm", "adapter"),
    ],
)
def test_names_of_both_libraries(name: str, kind: str) -> None:
    assert find_target(name, place="_target_").kind == kind


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "transformers.pipeline",
        "transformers.AutoModelForCausalLM.from_config",
        "transformers.os.system",
        "transformers.AutoModelForCausalLM.from_pretrained.__globals__",
        "transformers.AutoModelForCausalLM\nos.system",
        "transformers.__loader__.AutoTokenizer",
        "fusion_bench.CLIPModel",
        "AutoModelForCausalLM",
        "",
        None,
        3,
        ["os", "system"],
    ],
)
def test_anything_else_is_refused(name: object) -> None:
    with pytest.raises(PoolError, match=r"models\.a\._target_ is .*, which a configuration cannot ask for"):
        find_target(name, place="models.a._target_")


def test_the_list_stands_once_below_all_problems() -> None:
    with pytest.raises(PoolError) as caught:
        find_target("transformers.AutoModelForCausalLm", place="models.a._target_")
    assert "Did you mean 'transformers.AutoModelForCausalLM.from_pretrained'" in str(caught.value)
    text = join_problems([str(caught.value), str(caught.value)])
    assert text.count("runs no code but what is listed") == 1
    assert "hooklens.pool.register_target(name, function) adds to it" in text
    assert join_problems(["something else"]) == "something else"


def test_registered_functions_are_found_and_replaced() -> None:
    register_target("mine.load", len)
    assert find_target("mine.load", place="").function is len
    register_target("mine.load", dict)
    assert find_target("mine.load", place="").function is dict


@pytest.mark.parametrize(
    ("name", "function", "found"),
    [
        ("", len, "name is '', expected a text"),
        ("mine.load", "os.system", "function is 'os.system', expected a function or class"),
        ("transformers.AutoTokenizer", len, "stands for what it says already"),
        ("hooklens.pool.CausalLMPool", len, "stands for what it says already"),
    ],
)
def test_what_cannot_be_registered(name: str, function: object, found: str) -> None:
    with pytest.raises(PoolError, match=found):
        register_target(name, function)  # type: ignore[arg-type]


def test_targets_inside_arguments() -> None:
    register_target("mine.scale", float)
    allowed = {"x": [{"_target_": "mine.scale", "y": {"_target_": "transformers.AutoTokenizer", "name": "z"}}]}
    assert list(check_targets(allowed, place="models.a")) == []
    refused = {"x": [{"y": {"_target_": "os.system"}}], "z": {"_target_": "hooklens.HookedCausalLM"}}
    first, second = check_targets(refused, place="models.a")
    assert first.startswith("models.a.x.0.y._target_ is 'os.system', which a configuration cannot ask for")
    assert second.startswith("models.a.z._target_ is 'hooklens.HookedCausalLM', expected a tokenizer or a registered")
    (hydra,) = check_targets({"_target_": "mine.scale", "_partial_": True}, place="models.a.x")
    assert hydra.startswith("models.a.x._partial_ is Hydra's")
