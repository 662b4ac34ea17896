"""Meta's files of Llama against its published forward pass, written out here with complex rotations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens import HookedCausalLM, is_supported
from hooklens.errors import CheckpointError, UnsupportedModelError

PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 16,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
WIDTH = 112  # int(1.3 * int(8 * 32 / 3)) = 110, up to a multiple of 16.
IDS = torch.arange(3, 20)


def make_state(params: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    dim, d_kv = params["dim"], params["n_kv_heads"] * (params["dim"] // params["n_heads"])
    state = {"tok_embeddings.weight": draw(40, dim), "norm.weight": 1 + draw(dim), "output.weight": draw(40, dim)}
    for i in range(params["n_layers"]):
        maps = {
            "attention.wq": (dim, dim), "attention.wk": (d_kv, dim), "attention.wv": (d_kv, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (WIDTH, dim), "feed_forward.w2": (dim, WIDTH),
            "feed_forward.w3": (WIDTH, dim),
        }  # fmt: skip
        state |= {f"layers.{i}.{name}.weight": draw(*shape) for name, shape in maps.items()}
        state |= {f"layers.{i}.{name}.weight": 1 + draw(dim) for name in ("attention_norm", "ffn_norm")}
    return state | {"rope.freqs": torch.zeros(4)}


def scale_frequencies(freqs: Tensor, factor: float) -> Tensor:
    """Llama 3.1's `apply_scaling`."""
    scaled = []
    for freq in freqs:
        wavelength = 2 * torch.pi / freq
        if wavelength < 8192 / 4:
            scaled.append(freq)
        elif wavelength > 8192 / 1:
            scaled.append(freq / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return torch.tensor(scaled, dtype=freqs.dtype)


def forward(state: dict[str, Tensor], params: dict[str, Any], ids: Tensor, factor: float | None = None) -> Tensor:
    """Meta's `Transformer.forward`: pairs of neighbouring entries are complex numbers that are turned."""
    w = {name: tensor.double() for name, tensor in state.items()}
    n_heads, n_kv, d_head = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    # In float32, as there and in HookLens; the rest in float64.
    freqs = 1.0 / (params["rope_theta"] ** (torch.arange(0, d_head, 2).float() / d_head))
    freqs = freqs if factor is None else scale_frequencies(freqs, factor)
    angles = torch.outer(torch.arange(len(ids)).float(), freqs)
    turns = torch.complex(angles.cos(), angles.sin())[:, None, :].to(torch.complex128)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    h = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(params["n_layers"]):
        at = f"layers.{i}."
        x = norm(h, w[f"{at}attention_norm.weight"])
        q = rotate((x @ w[f"{at}attention.wq.weight"].T).view(len(ids), n_heads, d_head))
        k = rotate((x @ w[f"{at}attention.wk.weight"].T).view(len(ids), n_kv, d_head))
        v = (x @ w[f"{at}attention.wv.weight"].T).view(len(ids), n_kv, d_head)
        k, v = (one.repeat_interleave(n_heads // n_kv, dim=1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / d_head**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(ids), -1)
        h = h + mixed @ w[f"{at}attention.wo.weight"].T
        x = norm(h, w[f"{at}ffn_norm.weight"])
        gate = F.silu(x @ w[f"{at}feed_forward.w1.weight"].T)
        h = h + (gate * (x @ w[f"{at}feed_forward.w3.weight"].T)) @ w[f"{at}feed_forward.w2.weight"].T
    return norm(h, w["norm.weight"]) @ w["output.weight"].T


def save(folder: Path, state: dict[str, Tensor], *, n_files: int = 1, embedding: int = 0, **changes: Any) -> Path:
    """Write the files as model parallelism splits them."""
    folder.mkdir(exist_ok=True)
    params = {key: value for key, value in {**PARAMS, **changes}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    for number in range(n_files):
        part = {}
        for name, tensor in state.items():
            axis = (
                None if "norm" in name or "rope" in name
                else embedding if name == "tok_embeddings.weight"
                else 1 if "wo" in name or "w2" in name
                else 0
            )  # fmt: skip
            part[name] = tensor if axis is None else tensor.chunk(n_files, dim=axis)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


@pytest.mark.parametrize(("n_files", "embedding"), [(1, 0), (2, 0), (2, 1)])
def test_logits_are_those_of_metas_code(tmp_path, n_files, embedding) -> None:
    state = make_state(PARAMS)
    save(tmp_path, state, n_files=n_files, embedding=embedding)
    assert is_supported(tmp_path)
    model = HookedCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert (model.cfg.d_mlp, model.cfg.n_ctx, model.cfg.n_kv_heads) == (WIDTH, 8192, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, PARAMS, IDS), rtol=0.0, atol=1e-9)
    file = tmp_path / "consolidated.00.pth"
    assert torch.equal(HookedCausalLM.from_pretrained(file, layers=[1]).W_Q[0].double(), model.W_Q[1])

    model.save_pretrained(tmp_path / "saved")
    again = HookedCausalLM.from_pretrained(tmp_path / "saved")
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("given", "factor"), [(None, 8.0), (16.0, 16.0)])
def test_stretched_frequencies(tmp_path, given, factor) -> None:
    state = make_state(PARAMS)
    save(tmp_path, state, use_scaled_rope=True, rope_scaling_factor=given)
    model = HookedCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert model.cfg.n_ctx == 131072
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, PARAMS, IDS, factor), rtol=0.0, atol=1e-9)


def test_settings_of_llama_2(tmp_path) -> None:
    """The vocabulary's size stands in the weights, heads are not grouped, the base is not given."""
    params = {**PARAMS, "n_kv_heads": 4, "rope_theta": 10000.0}
    state = make_state(params)
    save(tmp_path, state, n_files=2, embedding=1, vocab_size=-1, n_kv_heads=None, rope_theta=None)
    model = HookedCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert (model.cfg.d_vocab, model.cfg.n_ctx, model.cfg.n_kv_heads) == (40, 4096, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None])[0], forward(state, params, IDS), rtol=0.0, atol=1e-9)
    assert HookedCausalLM.from_config_of(tmp_path).cfg == model.cfg


def test_the_sizes_of_llama_3_2_are_stretched_further(tmp_path) -> None:
    save(tmp_path, make_state(PARAMS), use_scaled_rope=True, dim=2048, n_heads=32, n_kv_heads=8)
    scaling = HookedCausalLM.from_config_of(tmp_path).cfg.positions.scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32.0, 1.0, 4.0)


def test_params_that_are_wrong(tmp_path) -> None:
    save(tmp_path, make_state(PARAMS), dim="32", moe={"num_experts": 8}, norm_eps=None)
    expected = (
        r"params.json: .*dim is '32'; expected int; norm_eps is missing; moe is a key that HookLens does not know"
    )
    with pytest.raises(UnsupportedModelError, match=expected):
        HookedCausalLM.from_pretrained(tmp_path)
    assert not is_supported(tmp_path)


def test_files_that_are_missing_or_do_not_go_together(tmp_path) -> None:
    state = make_state(PARAMS)
    save(tmp_path, state, n_files=2)
    with pytest.raises(CheckpointError, match=r"another shape .*'lm_head.weight' is \[40, 32\], expected \[41, 32\]"):
        HookedCausalLM.from_pretrained(save(tmp_path, state, n_files=2, vocab_size=41))
    torch.save({"norm.weight": state["norm.weight"]}, tmp_path / "consolidated.01.pth")
    with pytest.raises(
        CheckpointError, match=r"tensors that only some of the 2 files hold: 'layers.0.attention.wk.weight'"
    ):
        HookedCausalLM.from_pretrained(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds params.json and 'consolidated.01.pth'; expected consolidated.00.pth"
    ):
        HookedCausalLM.from_pretrained(tmp_path)
