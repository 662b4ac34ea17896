"""Tests of hooklens.evaluation.fingerprint: equal for the same model, different for any other."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.evaluation.fingerprint import (
    describe_precision,
    model_fingerprint,
    tensor_fingerprint,
    token_fingerprint,
    tokenizer_fingerprint,
)
from tests.model.networks import CONFIGS, make_model


def test_models_are_told_apart():
    model = make_model("grouped")
    others = [
        make_model("grouped", seed=1),
        make_model("grouped", dtype=torch.float32),
        make_model(CONFIGS["grouped"].replace(act_fn="gelu")),
        make_model("grouped").process_weights(fold_ln=True),
    ]
    assert model_fingerprint(model) == model_fingerprint(make_model("grouped"))
    assert len({model_fingerprint(other) for other in [model, *others]}) == 5


@torch.no_grad()
def test_every_neuron_counts():
    """Of each weight 64 entries were looked at: a neuron set to zero showed in 64 of 344 cases."""
    model = make_model("bare")
    seen = {model_fingerprint(model)}
    d_mlp = model.cfg.d_mlp
    for neuron in range(d_mlp):
        kept = model.blocks[0].mlp.W_out[neuron].clone()
        model.blocks[0].mlp.W_out[neuron] = 0.0
        seen.add(model_fingerprint(model))
        model.blocks[0].mlp.W_out[neuron] = kept
    assert len(seen) == d_mlp + 1
    assert model_fingerprint(model) in seen


@torch.no_grad()
@settings(max_examples=40)
@given(data=st.data())
def test_any_change_of_any_weight_shows(data):
    """One entry by one bit, two signs, or two entries that change places, in any weight or buffer."""
    model = make_model("alibi, grouped")
    before = model_fingerprint(model)
    tensors = dict(model.named_parameters())
    weight = tensors[data.draw(st.sampled_from(sorted(tensors)))].data.view(-1)
    first = data.draw(st.integers(0, len(weight) - 1))
    second = data.draw(st.integers(0, len(weight) - 1))
    change = data.draw(st.sampled_from(["bit", "signs", "swap"]))
    kept = weight.clone()
    if change == "bit":
        weight[first : first + 1].view(torch.int64).bitwise_xor_(1 << data.draw(st.integers(0, 62)))
    elif change == "signs":
        weight[first] = -weight[first]
        weight[second] = -weight[second]
    else:
        weight[[first, second]] = weight[[second, first]]
    bits = [values.view(torch.int64) for values in (kept, weight)]
    assert (model_fingerprint(model) == before) == torch.equal(*bits)


def test_a_module_that_takes_anothers_place_and_a_buffer_show():
    class Louder(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = make_model("bare")
    seen = {model_fingerprint(model)}
    model.register_buffer("scale", torch.ones(3))
    seen.add(model_fingerprint(model))
    plain = model.blocks[0].mlp.out_proj
    louder = Louder(plain.in_features, plain.out_features, bias=plain.bias is not None).to(plain.weight.dtype)
    louder.load_state_dict(plain.state_dict())
    model.blocks[0].mlp.out_proj = louder
    seen.add(model_fingerprint(model))
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_entries_count_and_strides_do_not(dtype, monkeypatch):
    monkeypatch.setattr("hooklens.evaluation.fingerprint._CHUNK", 64)
    tensor = torch.arange(1, 121).view(10, 12).to(dtype)
    turned = tensor.T.contiguous().T
    assert not turned.is_contiguous()
    assert tensor_fingerprint(tensor) == tensor_fingerprint(turned) == tensor_fingerprint(tensor.clone())
    others = [tensor.T, tensor.view(12, 10), tensor.view(-1), tensor[:0], tensor[:, :0], tensor[0, 0]]
    others.append(tensor.to(torch.float64))
    assert len({tensor_fingerprint(other) for other in [tensor, *others]}) == len(others) + 1
    changed = tensor.clone()
    changed.view(-1)[-1] = 0
    assert tensor_fingerprint(changed) != tensor_fingerprint(tensor)


def test_tokens_are_told_apart():
    assert token_fingerprint([1, 23]) != token_fingerprint([12, 3])
    assert token_fingerprint([1, 23]) == token_fingerprint((1, 23))


class Wordless:
    bos_token_id = None

    def __len__(self):
        return 3


def test_tokenizers_are_told_apart():
    tokenizer = build_tokenizer(n_ctx=20)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["Mary", "Mary and John"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(build_tokenizer(n_ctx=20))
    grown, without_bos = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    grown.add_tokens(["elsewhere"])
    without_bos.eos_token = "Mary"
    found = [tokenizer_fingerprint(one) for one in (tokenizer, grown, without_bos, None, Wordless())]
    assert len(set(found)) == 5


def test_precision_is_told():
    assert describe_precision() == "full"
    with torch.autocast("cpu", torch.bfloat16):
        assert describe_precision() == "autocast on cpu to torch.bfloat16"
    torch.set_float32_matmul_precision("medium")
    try:
        assert describe_precision() == "float32 products are 'medium'"
    finally:
        torch.set_float32_matmul_precision("highest")
