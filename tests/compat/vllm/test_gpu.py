"""The real vLLM, where it is installed beside a GPU; both engines run one small Llama."""

import importlib.util

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.compat.vllm import VLLMModel, engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def test_captures_and_steering_of_a_real_engine(tmp_path):
    import vllm

    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    model.save_pretrained(tmp_path)
    llm = vllm.LLM(
        str(tmp_path),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=16,
        gpu_memory_utilization=0.3,
        max_model_len=64,
        worker_extension_cls=engine.EXTENSION,
    )
    served = VLLMModel(llm)
    prompts = [[40, 5, 9, 30, 12, 44, 80, 33] * 3, [70, 20, 100]]
    steer = edits.Add("blocks.1.hook_resid_post", torch.full((model.cfg.d_model,), 0.5))
    for using in ([], [steer]):
        _, caches = served.run_with_cache(prompts, "*", edits=using)
        for ids, cache in zip(prompts, caches, strict=True):
            with model.hooks(edits=using):
                _, own = model.run_with_cache(torch.tensor([ids]))
            for name, found in cache.items():
                # Kernels may multiply in TensorFloat-32, with ten bits of mantissa.
                torch.testing.assert_close(found, own[name][0], rtol=2e-2, atol=2e-2)
