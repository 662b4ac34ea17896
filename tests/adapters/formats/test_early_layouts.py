"""Layouts of before, made of today's, map by map."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.errors import CheckpointError
from tests.adapters.formats.test_transformer_lens import CONFIG, IDS, forward, make_state, save


def to_first_solu(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """`norm` in place of `ln`; `[out, in]` up to 6 layers, positions turned up to 8."""
    early = {}
    for name, tensor in state.items():
        is_turned = n_layers <= (8 if "W_pos" in name else 6) and "W_" in name
        before = name.replace("ln_final", "norm").replace("ln", "norm")
        early[before] = tensor.transpose(-2, -1).contiguous() if is_turned else tensor
    return early


def to_mingpt(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """The parameters of minGPT's modules, whose head has no bias."""
    early = {
        "tok_emb.weight": state["embed.W_E"],
        "pos_emb": state["pos_embed.W_pos"][None],
        "head.weight": state["unembed.W_U"].T,
        "ln_f.weight": state["ln_final.w"],
        "ln_f.bias": state["ln_final.b"],
    }
    for i in range(n_layers):
        layer = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items() if f"blocks.{i}." in name}
        moved = {"attn.mask": torch.ones(1, 1, 12, 12), "attn.proj.bias": layer["attn.b_O"]}
        moved["attn.proj.weight"] = rearrange(layer["attn.W_O"], "n h m -> m (n h)")
        for letter, called in (("Q", "query"), ("K", "key"), ("V", "value")):
            moved[f"attn.{called}.weight"] = rearrange(layer[f"attn.W_{letter}"], "n m h -> (n h) m")
            moved[f"attn.{called}.bias"] = layer[f"attn.b_{letter}"].flatten()
        for norm in ("ln1", "ln2"):
            moved |= {f"{norm}.weight": layer[f"{norm}.w"], f"{norm}.bias": layer[f"{norm}.b"]}
        for place, called in ((0, "in"), (2, "out")):
            moved |= {f"mlp.{place}.weight": layer[f"mlp.W_{called}"].T, f"mlp.{place}.bias": layer[f"mlp.b_{called}"]}
        early |= {f"blocks.{i}.{name}": value for name, value in moved.items()}
    return early


def check(folder, config: dict[str, Any], state: dict[str, Tensor], early: dict[str, Tensor]) -> None:
    model = HookedCausalLM.from_pretrained(save(folder, config, early), dtype="float64")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, config, IDS), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("n_layers", [2, 6, 7, 8, 9])
def test_first_solu_models(tmp_path, n_layers) -> None:
    config = {**CONFIG, "n_layers": n_layers}
    state = make_state(config)
    check(tmp_path, config, state, to_first_solu(state, n_layers))


def test_mingpt(tmp_path) -> None:
    config = {**CONFIG, "act_fn": "gelu", "architecture": "mingpt"}
    state = make_state(config)
    del state["unembed.b_U"]
    check(tmp_path, config, state, to_mingpt(state, 2))


def test_what_does_not_fit_is_told(tmp_path) -> None:
    config = {**CONFIG, "act_fn": "gelu", "architecture": "mingpt"}
    early = to_mingpt(make_state(config), 2)
    early |= {"blocks.0.attn.query.weight": torch.zeros(15, 16), "blocks.1.mlp.0.weight": torch.zeros(16)}
    early["blocks.1.attn.rotary"] = early.pop("blocks.1.attn.value.bias")
    expected = (
        r"unexpected tensors: 'blocks.1.attn.rotary'. tensors of another shape: 'blocks.0.attn.W_Q' is \[15, 16\], "
        r"expected \[4, 16, 4\]; 'blocks.1.mlp.W_in' is \[16\], expected \[16, 24\]"
    )
    with pytest.raises(CheckpointError, match=expected):
        HookedCausalLM.from_pretrained(save(tmp_path, config, early))
