"""Merges of hooked models: a new model of the same class; what cannot be merged is refused."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.weights import merging
from tests.merged_models import FAMILIES, build_models
from tests.tokens.tokenizers import ALL_SPECIAL, word_tokenizer


class Own(HookedCausalLM):
    """A class of a user's."""


@pytest.fixture(scope="module", params=FAMILIES)
def models(request) -> list[HookedCausalLM]:
    made = [Own.from_hf(model, word_tokenizer(**ALL_SPECIAL)) for model in build_models(request.param)]
    made[0].generation_config = {"max_new_tokens": 5}
    return made


@pytest.fixture(scope="module")
def llama() -> list[HookedCausalLM]:
    return [HookedCausalLM.from_hf(model) for model in build_models("llama", dtype=torch.float32)]


def test_a_merge_of_models_is_a_new_model(models):
    base, *rest = models
    before = {name: weight.clone() for name, weight in base.named_weights().items()}
    merged = merging.task_arithmetic(base, rest, scaling_factor=0.4)
    assert type(merged) is Own
    assert merged.cfg == base.cfg
    assert merged.tokenizer is base.tokenizer
    assert merged.generation_config == {"max_new_tokens": 5}
    assert merged.generation_config is not base.generation_config
    assert not merged.training
    for name, weight in merged.named_weights().items():
        expected = before[name] + 0.4 * sum(model.named_weights()[name] - before[name] for model in rest)
        torch.testing.assert_close(weight, expected, rtol=0.0, atol=1e-12)
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_weights().items())
    ids = torch.arange(12).view(1, 12)
    assert torch.isfinite(merged(ids)).all()
    # All of it can be trained, as that of any other model.
    merged(ids, return_type="loss").backward()
    assert all(parameter.grad is not None for name, parameter in merged.named_parameters() if "embed" in name)


def test_it_equals_the_merge_of_the_state_dicts(models):
    base, *rest = models
    merged = merging.ties_merging(base, rest, density=0.3)
    state = merging.ties_merging(base.state_dict(), [model.state_dict() for model in rest], density=0.3)
    assert merged.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in merged.state_dict().items())


def test_dtypes(llama):
    half = [HookedCausalLM.from_hf(model) for model in build_models("llama", dtype=torch.bfloat16)]
    assert merging.simple_average(llama, dtype="bfloat16").dtype == torch.bfloat16
    assert merging.task_arithmetic(half[0], half[1:]).dtype == torch.bfloat16
    # What counts is the base's; the others are taken as they are.
    mixed = merging.task_arithmetic(llama[0], [half[1]], scaling_factor=1.0)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed.W_E, half[1].W_E.float())


def test_one_model_with_its_task_vector_is_that_model(llama):
    merged = merging.task_arithmetic(llama[0], [llama[1]], scaling_factor=1.0)
    assert all(torch.equal(weight, llama[1].state_dict()[name]) for name, weight in merged.state_dict().items())


def test_what_cannot_be_merged_is_refused(llama):
    base, model, *_ = llama
    processed = model.process_weights(fold_ln=True)
    meta = HookedCausalLM(base.cfg).to("meta")
    wrapped = model.dequantize()
    wrapped.blocks[0].attn.q_proj.extra = torch.nn.Parameter(torch.ones(2))
    longer = HookedCausalLM(base.cfg.replace(attn_scale=0.5))
    for merge, text in (
        (
            lambda: merging.simple_average([base, processed]),
            r"models\[1\]: its weights have been processed \(fold_ln\)",
        ),
        (lambda: merging.simple_average([base, meta]), r"models\[1\]: .* hold no values"),
        (lambda: merging.simple_average([base, wrapped]), r"models\[1\]: has parameters beside .*q_proj.extra"),
        (lambda: merging.simple_average([base, longer]), r"attn_scale is None and 0.5 between models\[0\] and models"),
        (lambda: merging.simple_average([base, model.state_dict()]), r"hooked models and models\[1\] of state dicts"),
        (lambda: merging.simple_average([base, model], out="folder"), r"out='folder' goes with folders"),
        (lambda: merging.simple_average([base, torch.nn.Linear(2, 2)]), r"models\[1\] is a Linear, .*from_hf"),
    ):
        with pytest.raises(InputError, match=text):
            merge()


def test_a_longer_context_is_no_other_network(llama):
    base, model, *_ = llama
    longer = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg.replace(n_ctx=128))
    assert merging.simple_average([base, longer]).cfg.n_ctx == 64
