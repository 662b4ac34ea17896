"""nanoGPT's files against transformers' GPT-2 of the same weights, turned by the tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hooklens import HookedCausalLM, is_supported
from hooklens.adapters import open_checkpoint
from hooklens.errors import CheckpointError, UnsupportedModelError

ARGS: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 12, "bias": True, "vocab_size": 31, "dropout": 0.1,
}  # fmt: skip
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
IDS = torch.arange(3, 14)[None]


def build(*, bias: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4, activation_function="gelu")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "ln_" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.3)
            if not bias and name.endswith("bias"):
                parameter.zero_()
    return model


def state_of(model: GPT2LMHeadModel, *, bias: bool = True, prefix: str = "") -> dict[str, Tensor]:
    """The weights as nanoGPT has them: maps as `nn.Linear`, no biases where it has none, the mask of attention."""
    state = {}
    for name, value in model.state_dict().items():
        if bias or not name.endswith("bias"):
            state[prefix + name] = value.T.contiguous() if name.endswith(TURNED) else value
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    return state


def save(path: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    torch.save(
        {"model": state, "model_args": {**ARGS, **changes}, "optimizer": optimizer, "iter_num": 5, "config": {}}, path
    )
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("as_folder", [True, False])
def test_logits_are_those_of_the_same_gpt2(tmp_path, prefix, bias, as_folder) -> None:
    reference = build(bias=bias)
    path = save(tmp_path / "ckpt.pt", state_of(reference, bias=bias, prefix=prefix), bias=bias)
    source = tmp_path if as_folder else path
    assert is_supported(source)
    model = HookedCausalLM.from_pretrained(source)
    assert model.cfg.qkv_bias is bias
    assert model.cfg.tied_unembed
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS).logits, rtol=0.0, atol=2e-5)
    part = HookedCausalLM.from_pretrained(source, layers=[1], n_ctx=5, dtype="float64")
    assert torch.equal(part.W_in[0], model.W_in[1].double())
    assert part.pos_embed.W_pos.shape == (5, 16)


def test_tensors_are_read_one_by_one_by_name(tmp_path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "ckpt.pt", state_of(build())))
    for name, tensor in checkpoint.tensors():
        assert torch.equal(checkpoint.read(name), tensor), name
    with pytest.raises(KeyError, match=r"blocks\.0\.nothing"):
        checkpoint.read("blocks.0.nothing")


def test_it_is_saved_as_the_gpt2_that_it_is(tmp_path) -> None:
    reference = build()
    save(tmp_path / "ckpt.pt", state_of(reference))
    HookedCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, reference(IDS).logits)


def test_the_network_alone(tmp_path) -> None:
    save(tmp_path / "ckpt.pt", state_of(build()))
    made = HookedCausalLM.from_config_of(tmp_path)
    assert (made.cfg.n_layers, made.cfg.n_ctx, made.cfg.d_mlp, made.cfg.act_fn) == (2, 12, 64, "gelu")
    assert next(made.parameters()).is_meta


def test_sizes_that_are_wrong_and_tensors_that_are_others(tmp_path) -> None:
    state = state_of(build())
    with pytest.raises(
        UnsupportedModelError, match=r"ckpt.pt: model_args describes .* n_head is '4'; expected int; .*bias is 1"
    ):
        HookedCausalLM.from_pretrained(save(tmp_path / "ckpt.pt", state, n_head="4", bias=1))
    del state["transformer.h.1.mlp.c_fc.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match=r"missing tensors: 'transformer.h.1.mlp.c_fc.weight'. unexpected tensors: "
    ):
        HookedCausalLM.from_pretrained(save(tmp_path / "ckpt.pt", state))


class Bomb:
    exploded = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "exploded", True)


def test_nothing_in_a_file_is_executed(tmp_path) -> None:
    torch.save({"model": Bomb(), "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"refused: .*never runs code"):
        HookedCausalLM.from_pretrained(tmp_path)
    assert not Bomb.exploded


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, [1, 2], {"model": {"a": 1}, "model_args": ARGS}])
def test_files_of_something_else(tmp_path, content) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is in none of the formats that one file can be in; expected nanoGPT's"):
        HookedCausalLM.from_pretrained(tmp_path / "other.pt")
