"""`from_pretrained(..., quantize="int8" | "int4")` of mixtures of experts, against transformers on the same numbers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hooklens import HookedCausalLM, verify
from hooklens.model.parts.part import is_plain
from hooklens.model.parts.quantised import quantised_maps
from tests.checkpoints import D_VOCAB, _randomise

_SIZES = {
    "vocab_size": D_VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
# Experts in tensors of their own; beside one that sees every token, behind a gate; in one tensor, halves alternating.
MODELS = {
    "apart": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=128, num_local_experts=4)),
    "shared": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_SIZES, num_experts=4, intermediate_size=128, moe_intermediate_size=64,
            shared_expert_intermediate_size=64, sliding_window=None,
        )
    ),
    "stacked": lambda: GptOssForCausalLM(
        GptOssConfig(**_SIZES, head_dim=16, intermediate_size=64, num_local_experts=4, max_position_embeddings=64)
    ),
}  # fmt: skip
# Maps of a layer: attention's, three of each expert, three of the shared one.
MAPS = {"apart": 4 + 12, "shared": 4 + 12 + 3, "stacked": 4 + 12}
TOKENS = torch.randint(D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
# float32 logits of some ten, of two computations of the same function.
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in made.items():
        _randomise(MODELS[name](), 0).save_pretrained(folder)
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_experts_are_quantised(folders, tmp_path, name, quantize) -> None:
    """transformers computes the same with the numbers that are saved of them, those that are multiplied with."""
    model = HookedCausalLM.from_pretrained(folders[name], quantize=quantize)
    plain = HookedCausalLM.from_pretrained(folders[name])
    maps = quantised_maps(model)
    assert len(maps) == 2 * MAPS[name]
    assert is_plain(model.blocks[0].mlp.router_proj)
    model.save_pretrained(tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), hf_model(TOKENS).logits, **CLOSE)
    # 8 bits round to half of the largest magnitude of a row by 127; a value of NF4's is at most 0.16 of it away.
    for weight in ("W_gate", "W_in", "W_out"):
        for expert in range(4):
            ours, theirs = (getattr(one.blocks[1].mlp, weight)[expert].T for one in (model, plain))
            largest = theirs.abs().amax(1, keepdim=True)
            assert ((ours - theirs).abs() <= largest * {"int8": 0.51 / 127, "int4": 0.16}[quantize]).all(), weight
            assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_another_dtype(folders, dtype) -> None:
    for quantize in ("int8", "int4"):
        model = HookedCausalLM.from_pretrained(folders["shared"], quantize=quantize, dtype=dtype)
        logits, cache = model.run_with_cache(TOKENS, names_filter=lambda one: one.endswith("experts.hook_post"))
        assert logits.dtype == model.blocks[0].mlp.W_out.dtype == dtype
        assert logits.isfinite().all()
        assert {tensor.dtype for tensor in cache.values()} == {dtype}


def test_some_layers_on_a_device_map(folders) -> None:
    model = HookedCausalLM.from_pretrained(folders["apart"], quantize="int8", layers=[1], device_map={"": "cpu"})
    whole = HookedCausalLM.from_pretrained(folders["apart"], quantize="int8")
    assert torch.equal(model.blocks[0].mlp.W_out, whole.blocks[1].mlp.W_out)


def test_verify_runs_on_quantised_experts(folders) -> None:
    model = HookedCausalLM.from_pretrained(folders["apart"], quantize="int8", layers=[0])
    report = verify(model, layers=[], dtypes=[torch.float32], gradients=False, n_tokens=8, progress=False)
    assert report.passed, report
    assert not any("not recomputed" in note for note in report.notes)
