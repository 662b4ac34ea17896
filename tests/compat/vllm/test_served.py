"""Captures and edits on a served model against HookedCausalLM's own, on a stub of vLLM's worker interface."""

from types import SimpleNamespace

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.compat.vllm import VLLMModel, engine
from hooklens.errors import EditError, HookLensError, HookNameError, InputError, UnsupportedModelError
from tests.compat.vllm.stub import LlamaDecoderLayer, StubLLM

# No id of a padding or other special token: HookedCausalLM would read it as such.
PROMPTS = [[40, 5, 9, 30, 12, 44, 80, 33], [70, 20, 100], [11, 60, 61, 62, 63, 64]]
ONE, THREE = SimpleNamespace(max_tokens=1, n=1), SimpleNamespace(max_tokens=3, n=1)
# Float32 in another order of sums, through four layers of activations of size ten or less.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return HookedCausalLM.from_pretrained("bundled:tiny-llama")


@pytest.fixture(autouse=True)
def _version(monkeypatch):
    monkeypatch.setattr(engine.metadata, "version", lambda _: "0.33.0")


@pytest.mark.parametrize("budget", [2, 5, 100])
def test_captures_are_the_models_own(model, budget):
    served = VLLMModel(StubLLM(model, budget=budget))
    outputs, caches = served.run_with_cache(PROMPTS, "*", sampling_params=THREE, generated=True)
    for ids, output, cache in zip(PROMPTS, outputs, caches, strict=True):
        _, own = model.run_with_cache(torch.tensor([ids + output.outputs[0].token_ids[:-1]]))
        assert list(cache) == list(served.hook_names)
        for name, found in cache.items():
            torch.testing.assert_close(found, own[name][0], **CLOSE)


def test_prompts_alone_are_kept_unless_asked(model):
    _, caches = VLLMModel(StubLLM(model)).run_with_cache(PROMPTS, sampling_params=THREE)
    assert [len(cache["blocks.0.hook_resid_post"]) for cache in caches] == [8, 3, 6]


def _vector(model, *shape):
    return torch.randn(*shape, model.cfg.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("point", engine.POINTS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", ["add", "last", "list", "slice", "project", "set", "scale", "zero"])
def test_edits_change_logits_as_they_do_here(model, point, layer, kind):
    name, vector = f"blocks.{layer}.{point}", _vector(model)
    edit = {
        "add": edits.Add(name, 3 * vector),
        "last": edits.Replace(name, vector, pos=-1),
        "list": edits.Add(name, _vector(model, 2), pos=[2, 0]),
        "slice": edits.Add(name, _vector(model, 2), pos=slice(1, 3)),
        "project": edits.Project(name, vector),
        "set": edits.SetComponents(name, vector, 4.0, when="prefill"),
        "scale": edits.Scale(name, 0.5, pos=-1),
        "zero": edits.Zero(name),
    }[kind]
    llm = StubLLM(model, budget=4)
    _, caches = VLLMModel(llm).run_with_cache(PROMPTS, [name], edits=[edit], sampling_params=ONE)
    for row, ids in enumerate(PROMPTS):
        with model.hooks(edits=[edit]):
            logits, own = model.run_with_cache(torch.tensor([ids]), names_filter=[name])
        torch.testing.assert_close(llm.logits[str(7 + row)][0], logits[0, -1], **CLOSE)
        torch.testing.assert_close(caches[row][name], own[name][0], **CLOSE)
        assert not torch.allclose(model(torch.tensor([ids]))[0, -1], logits[0, -1], **CLOSE), "the edit did nothing"


def test_rows_are_prompts_and_other_requests_stay_bit_equal(model):
    plain, steered = StubLLM(model), StubLLM(model)
    VLLMModel(plain).generate(PROMPTS, THREE)
    edit = edits.Add("blocks.1.hook_resid_post", 9 * _vector(model), rows=1)
    VLLMModel(steered).generate(PROMPTS, THREE, edits=[edit])
    for key, is_same in (("7", True), ("8", False), ("9", True)):
        assert torch.equal(plain.logits[key][0], steered.logits[key][0]) == is_same


@pytest.mark.parametrize("when", ["all", "prefill", "decode"])
def test_steered_generation_is_the_models_own(model, when):
    edit = edits.Add("blocks.1.hook_resid_post", 6 * _vector(model), when=when)
    outputs = VLLMModel(StubLLM(model)).generate(PROMPTS, SimpleNamespace(max_tokens=6, n=1), edits=[edit])
    for ids, output in zip(PROMPTS, outputs, strict=True):
        with model.hooks(edits=[edit]):
            own = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, stop_at_eos=False)
        assert own[0, len(ids) :].tolist() == output.outputs[0].token_ids


def test_nothing_stays_on_the_model(model):
    llm = StubLLM(model)
    served = VLLMModel(llm)
    served.run_with_cache(PROMPTS, "*", edits=[edits.Zero("blocks.1.hook_mlp_out")], sampling_params=ONE)
    runner = llm.worker.model_runner
    assert "prepare_inputs" not in vars(runner)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in runner.model.modules())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"enforce_eager": False}, "enforce_eager=True"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching=False"),
        ({"speculative_config": 1}, "speculative"),
        ({"kv_transfer_config": 1}, "kv_transfer_config"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=1"),
        ({"data_parallel_size": 2}, "data_parallel_size=1"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "enable_dbo=False"),
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"worker_extension_cls": ""}, "worker_extension_cls="),
        ({"layer": type("OddLayer", (LlamaDecoderLayer,), {})}, "OddLayer"),
    ],
)
def test_engines_that_cannot_be_hooked(model, setting, text):
    with pytest.raises(UnsupportedModelError, match=text):
        VLLMModel(StubLLM(model, **setting))


def test_other_versions(model, monkeypatch):
    monkeypatch.setattr(engine.metadata, "version", lambda _: "0.34.1")
    with pytest.raises(UnsupportedModelError, match=r"vllm is 0\.34\.1"):
        VLLMModel(StubLLM(model))


def test_bad_input_is_refused_before_the_engine_runs(model):
    served = VLLMModel(llm := StubLLM(model))
    name = "blocks.0.hook_resid_post"
    for edit, text in (
        (edits.Custom(name, lambda x: x), "Custom.*functions"),
        (edits.Mean(name), "Mean"),
        (edits.Zero(name, rows=5), "rows"),
        (edits.Zero(name, head=0), "heads"),
        (edits.Zero(name, pos=3), "position 3"),
        (edits.Add(name, torch.zeros(5)), "shape"),
        (edits.Add(name, torch.zeros(128).double()), "float64"),
    ):
        with pytest.raises(EditError, match=text):
            served.generate(PROMPTS, ONE, edits=[edit])
    with pytest.raises(HookNameError):
        served.run_with_cache(PROMPTS, "blocks.0.attn.hook_z", sampling_params=ONE)
    for prompts in ("text", [], [[]], [[1.5]]):
        with pytest.raises(InputError, match="prompts"):
            served.generate(prompts, ONE)
    with pytest.raises(InputError, match="n=1"):
        served.generate(PROMPTS, SimpleNamespace(max_tokens=1, n=2))
    assert not llm.logits


def test_tokens_that_pass_no_hook_are_told(model):
    served = VLLMModel(llm := StubLLM(model))
    real = llm.generate
    llm.generate = lambda prompts, *args, **keywords: real(
        [{"prompt_token_ids": one["prompt_token_ids"][:-1]} for one in prompts], *args, **keywords
    )
    with pytest.raises(HookLensError, match="7 of 8 tokens"):
        served.run_with_cache(PROMPTS, sampling_params=ONE)
