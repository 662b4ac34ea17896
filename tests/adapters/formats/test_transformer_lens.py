"""TransformerLens's checkpoints against its forward pass, written out here map by map."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, is_supported
from hooklens.errors import CheckpointError, UnsupportedModelError

# The words of the published files of attention-only and SoLU models, with settings of the training run.
CONFIG: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "d_mlp": 24, "d_head": 4, "n_heads": 4, "n_ctx": 12, "d_vocab": 31,
    "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits", "act_fn": "solu_ln", "attn_only": False,
    "final_rms": False, "normalization": "LN", "shortformer_pos": False, "lr": 1e-3, "betas": [0.9, 0.99],
    "weight_decay": 0.05, "model_name": "SoLU_2L", "n_params": -1,
}  # fmt: skip
IDS = torch.arange(3, 14)


def make_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the library's names, with its buffers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    d, n, h, f, v = (config[key] for key in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab"))
    kind = config.get("normalization", config.get("normalization_type"))
    state = {"embed.W_E": draw(v, d), "pos_embed.W_pos": draw(config["n_ctx"], d)}
    state |= {"unembed.W_U": draw(d, v), "unembed.b_U": draw(v)}

    def add_norm(name: str, size: int, kind: str | None) -> None:
        if kind in {"LN", "RMS"}:
            state[f"{name}.w"] = 1 + draw(size)
        if kind == "LN":
            state[f"{name}.b"] = draw(size)

    for i in range(config["n_layers"]):
        at = f"blocks.{i}"
        add_norm(f"{at}.ln1", d, kind)
        for letter in "QKV":
            state |= {f"{at}.attn.W_{letter}": draw(n, d, h), f"{at}.attn.b_{letter}": draw(n, h)}
        state |= {f"{at}.attn.W_O": draw(n, h, d), f"{at}.attn.b_O": draw(d)}
        state |= {f"{at}.attn.mask": torch.ones(12, 12).tril().bool(), f"{at}.attn.IGNORE": torch.tensor(-1e5)}
        if not config["attn_only"]:
            add_norm(f"{at}.ln2", d, kind)
            state |= {f"{at}.mlp.W_in": draw(d, f), f"{at}.mlp.b_in": draw(f)}
            state |= {f"{at}.mlp.W_out": draw(f, d), f"{at}.mlp.b_out": draw(d)}
            if config["act_fn"] == "solu_ln":
                add_norm(f"{at}.mlp.ln", f, kind)
    add_norm("ln_final", d, "RMS" if config.get("final_rms") and kind == "LN" else kind)
    return state


def forward(state: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """The library's `HookedTransformer.forward`."""
    w = {name: tensor.double() for name, tensor in state.items()}
    kind = config.get("normalization", config.get("normalization_type"))

    def norm(x: Tensor, name: str, kind: str | None) -> Tensor:
        if kind is None:
            return x
        centred = x if kind.startswith("RMS") else x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + config.get("eps", 1e-5)).sqrt()
        return scaled if kind.endswith("Pre") else scaled * w[f"{name}.w"] + w.get(f"{name}.b", 0.0)

    positions = w["pos_embed.W_pos"][: len(ids)]
    is_shortformer = config.get("shortformer_pos") or config.get("positional_embedding_type") == "shortformer"
    x = w["embed.W_E"][ids] + (0.0 if is_shortformer else positions)
    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(config["n_layers"]):
        at = f"blocks.{i}"
        read = norm(x, f"{at}.ln1", kind)
        placed = read + positions if is_shortformer else read
        q, k, v = (
            torch.einsum("pd,ndh->pnh", given, w[f"{at}.attn.W_{letter}"]) + w.get(f"{at}.attn.b_{letter}", 0.0)
            for letter, given in (("Q", placed), ("K", placed), ("V", read))
        )
        scale = config["d_head"] ** 0.5 if config.get("use_attn_scale", True) else 1.0
        pattern = (torch.einsum("qnh,knh->nqk", q, k) / scale + mask).softmax(-1)
        z = torch.einsum("nqk,knh->qnh", pattern, v)
        x = x + torch.einsum("qnh,nhd->qd", z, w[f"{at}.attn.W_O"]) + w.get(f"{at}.attn.b_O", 0.0)
        if not config["attn_only"]:
            pre = norm(x, f"{at}.ln2", kind) @ w[f"{at}.mlp.W_in"] + w[f"{at}.mlp.b_in"]
            if config["act_fn"] == "solu_ln":
                post = norm(pre * pre.softmax(-1), f"{at}.mlp.ln", "LN" if kind == "LN" else "LNPre")
            else:
                post = torch.nn.functional.gelu(pre)
            x = x + post @ w[f"{at}.mlp.W_out"] + w[f"{at}.mlp.b_out"]
    if config.get("final_rms"):
        kind = "RMSPre" if kind == "LNPre" else "RMS"
    return norm(x, "ln_final", kind) @ w["unembed.W_U"] + w.get("unembed.b_U", 0.0)


def save(folder: Path, config: dict[str, Any], state: dict[str, Tensor], name: str = "model_final.pth") -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / name)
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "solu": {},
    "attention only": {"attn_only": True},
    "attention only, shortformer": {"attn_only": True, "shortformer_pos": True},
    "final rms": {"final_rms": True},
    "folded": {"normalization": "LNPre", "final_rms": True},
    "no norms": {"normalization": None, "act_fn": "gelu"},
    "newer words": {
        "normalization": None, "normalization_type": "RMS", "act_fn": "gelu", "eps": 1e-4, "use_attn_scale": False,
        "positional_embedding_type": "standard", "attention_dir": "causal", "d_vocab_out": -1, "gated_mlp": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_library(tmp_path, name) -> None:
    config = {**CONFIG, **VARIANTS[name]}
    if name == "newer words":
        del config["normalization"], config["shortformer_pos"]
    state = make_state(config)
    save(tmp_path, config, state)
    assert is_supported(tmp_path)
    model = HookedCausalLM.from_pretrained(tmp_path, dtype="float64")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, config, IDS), rtol=0.0, atol=1e-9)
    assert HookedCausalLM.from_config_of(tmp_path).cfg == model.cfg
    part = HookedCausalLM.from_pretrained(tmp_path / "model_final.pth", layers=[1], n_ctx=5)
    assert torch.equal(part.W_Q[0], state["blocks.1.attn.W_Q"])
    assert part.pos_embed.W_pos.shape == (5, 16)


def test_biases_that_the_file_lacks_are_zero(tmp_path) -> None:
    config = {**CONFIG, "attn_only": True}
    state = {name: value for name, value in make_state(config).items() if ".b_" not in name}
    model = HookedCausalLM.from_pretrained(save(tmp_path, config, state), dtype="float64")
    assert not model.cfg.unembed_bias
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, config, IDS), rtol=0.0, atol=1e-9)


def test_which_of_several_files(tmp_path) -> None:
    state = make_state(CONFIG)
    save(tmp_path, CONFIG, {**state, "unembed.b_U": state["unembed.b_U"] + 1}, "SoLU_2L_000000100.pth")
    model = HookedCausalLM.from_pretrained(save(tmp_path, CONFIG, state, "SoLU_2L_final.pth"))
    assert torch.equal(model.b_U, state["unembed.b_U"])
    earlier = HookedCausalLM.from_pretrained(tmp_path / "SoLU_2L_000000100.pth")
    assert torch.equal(earlier.b_U, state["unembed.b_U"] + 1)
    (tmp_path / "SoLU_2L_final.pth").rename(tmp_path / "SoLU_2L_000000200.pth")
    with pytest.raises(CheckpointError, match=r"expected one .pth file, or one that ends with 'final.pth'"):
        HookedCausalLM.from_pretrained(tmp_path)


def test_settings_that_are_not_implemented(tmp_path) -> None:
    changes = {"act_fn": "mish", "load_in_4bit": True, "use_local_attn": True, "d_head": "4", "normalization": "BN"}
    save(tmp_path, {**CONFIG, **changes, "positional_embedding_type": "rope"}, make_state(CONFIG))
    with pytest.raises(UnsupportedModelError, match=r"config.json: describes a network that HookLens can") as caught:
        HookedCausalLM.from_pretrained(tmp_path)
    named = {*changes, "positional_embedding_type", "attn_types"} - {"use_local_attn"}
    assert [key for key in named if f"{key} is " not in str(caught.value)] == []


def test_tensors_that_are_others(tmp_path) -> None:
    state = make_state(CONFIG)
    del state["blocks.1.mlp.W_in"]
    state |= {"extra": torch.zeros(1), "embed.W_E": torch.zeros(30, 16), "ln_final.w": torch.ones(16).int()}
    expected = (
        r"missing tensors: 'blocks.1.mlp.W_in'. unexpected tensors: 'extra'. tensors of another shape: 'embed.W_E' is "
        r"\[30, 16\], expected \[31, 16\]. tensors that are no floating-point weights: 'ln_final.w' is torch.int32"
    )
    with pytest.raises(CheckpointError, match=expected):
        HookedCausalLM.from_pretrained(save(tmp_path, CONFIG, state))
