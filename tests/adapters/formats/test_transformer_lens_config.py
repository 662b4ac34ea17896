"""TransformerLens's words for networks: what is read computes what TransformerLens 2.18 computes, and is written back.

The numbers are those of its `HookedTransformer` with the weights of `make_state`.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, HookedConfig, NoPositions, NormConfig, PartConfig, RotaryPositions, RotaryScaling
from hooklens.adapters.formats.transformer_lens_config import read_words, write_words
from hooklens.errors import UnsupportedModelError

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 30, 8, 0, 7]])
BASE: dict[str, Any] = {
    "d_model": 16, "n_layers": 3, "d_head": 8, "n_heads": 4, "n_ctx": 12, "d_vocab": 31, "d_mlp": 24,
    "act_fn": "gelu", "normalization_type": "LN",
}  # fmt: skip
_ROTARY = {"positional_embedding_type": "rotary"}
_AROUND = {
    **_ROTARY, "normalization_type": "RMS", "use_normalization_before_and_after": True, "use_local_attn": True,
    "window_size": 4, "gated_mlp": True, "act_fn": "gelu_pytorch_tanh",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {**_ROTARY, "rotary_dim": 4},
    "rotary adjacent": {**_ROTARY, "rotary_adjacent_pairs": True, "rotary_base": 500, "act_fn": "gelu_new"},
    "llama 3.1": {
        **_ROTARY, "use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 32, "NTK_by_parts_factor": 4.0, "eps": 1e-6,
        "normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "act_fn": "silu", "n_key_value_heads": 2,
    },
    "gemma 2": {
        **_AROUND, "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 3.0, "n_key_value_heads": 1,
        "attn_types": ["global", "local", "global"], "attn_scale": 3.0,
    },
    "gemma 3": {
        **_AROUND, "use_qk_norm": True, "rotary_base": 1000, "rotary_base_local": 100, "n_key_value_heads": 2,
        "attn_types": ["local", "global", "local"],
    },
    "alibi": {"positional_embedding_type": "alibi", "post_embedding_ln": True, "act_fn": "gelu_fast"},
    "gpt-j": {**_ROTARY, "rotary_adjacent_pairs": True, "rotary_dim": 4, "parallel_attn_mlp": True},
    "stanford": {"scale_attn_by_inverse_layer_idx": True},
    "gpt-neo": {
        "use_attn_scale": False, "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local", "local"],
    },
    "classifier": {
        "normalization_type": None, "attention_dir": "bidirectional", "d_vocab_out": 5, "act_fn": "relu",
    },
    "attention only": {
        "attn_only": True, "d_mlp": None, "act_fn": None, "normalization_type": "LNPre",
        "positional_embedding_type": "shortformer",
    },
    "solu": {"act_fn": "solu_ln", "normalization_type": "LNPre", "final_rms": True},
    "solu LN": {"act_fn": "solu_ln"},
    "plain solu RMSPre": {"act_fn": "solu", "normalization_type": "RMSPre"},
    "xielu": {"act_fn": "xielu"},
    "mixtral": {
        **_ROTARY, "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "num_experts": 4,
        "experts_per_token": 2, "n_key_value_heads": 2,
    },
}  # fmt: skip
# Three logits of the last token, and the mean of the absolute value of all.
NUMBERS = {
    "rotary": [-0.36004, 0.28966, 0.57100, 0.36367],
    "rotary adjacent": [-0.36366, 0.26055, 0.55405, 0.35998],
    "llama 3.1": [-0.58278, 1.18087, 1.50352, 0.94789],
    "gemma 2": [0.69130, 0.16842, -0.58321, 0.52995],
    "gemma 3": [-0.13991, 0.30331, 0.30979, 0.44305],
    "alibi": [2.45314, -1.27407, -3.28694, 2.13294],
    "gpt-j": [-0.22756, 0.20439, 0.37831, 0.27342],
    "stanford": [-0.34108, -0.62418, -0.08125, 0.46973],
    "gpt-neo": [-0.67904, -0.69490, 0.20811, 0.51595],
    "classifier": [-8.10087, -9.49094, -0.84348, 7.41450],
    "attention only": [0.29888, -0.28930, -0.62666, 0.35597],
    "solu": [-0.22543, -0.37657, -0.12719, 0.25081],
    "solu LN": [-0.46222, 0.12346, 0.54030, 0.34869],
    "plain solu RMSPre": [-0.16083, -0.33014, -0.14803, 0.22778],
    "xielu": [-0.39120, 0.16447, 0.49280, 0.27589],
    "mixtral": [1.06613, -3.66340, -2.23499, 1.28695],
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters of TransformerLens's network."""
    d, n, h, f, v = (config[key] for key in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab"))
    kind, shared = config["normalization_type"], config.get("n_key_value_heads")
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (v, d), "unembed.W_U": (d, config.get("d_vocab_out", v))}
    shapes["unembed.b_U"] = shapes["unembed.W_U"][1:]
    if config.get("positional_embedding_type") != "rotary":
        shapes["pos_embed.W_pos"] = (config["n_ctx"], d)

    def add_norm(name: str, kind: str | None, size: int = d) -> None:
        shapes.update({f"{name}.{one}": (size,) for one in {"LN": "wb", "RMS": "w"}.get(kind or "", "")})

    if config.get("post_embedding_ln"):
        add_norm("embed.ln", "LN")
    for i in range(config["n_layers"]):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        shapes |= {f"{attn}.W_Q": (n, d, h), f"{attn}.b_Q": (n, h), f"{attn}.W_O": (n, h, d), f"{attn}.b_O": (d,)}
        for letter in "KV":
            own = "_" if shared else ""
            shapes |= {f"{attn}.{own}W_{letter}": (shared or n, d, h), f"{attn}.{own}b_{letter}": (shared or n, h)}
        norms = ["ln1"] if config.get("attn_only") else ["ln1", "ln2"]
        for one in norms:
            add_norm(f"blocks.{i}.{one}", kind)
            if config.get("use_normalization_before_and_after"):
                add_norm(f"blocks.{i}.{one}_post", kind)
        for one in "qk" if config.get("use_qk_norm") else "":
            add_norm(f"{attn}.{one}_norm", "RMS", h)
        if config.get("attn_only"):
            continue
        if n_experts := config.get("num_experts"):
            shapes[f"{mlp}.W_gate.weight"] = (n_experts, d)
            for e in range(n_experts):
                shapes |= {f"{mlp}.experts.{e}.W_{one}.weight": (f, d) for one in ("in", "gate")}
                shapes[f"{mlp}.experts.{e}.W_out.weight"] = (d, f)
            continue
        shapes |= {f"{mlp}.W_in": (d, f), f"{mlp}.b_in": (f,), f"{mlp}.W_out": (f, d), f"{mlp}.b_out": (d,)}
        shapes |= {f"{mlp}.W_gate": (d, f)} if config.get("gated_mlp") else {}
        shapes |= {f"{mlp}.act_fn.alpha_{one}": () for one in ("pn" if config["act_fn"] == "xielu" else "")}
        if config["act_fn"] == "solu_ln":
            add_norm(f"{mlp}.ln", "LN" if kind == "LN" else None, f)
    final_rms = config.get("final_rms") and kind in {"LN", "RMS"}
    add_norm("ln_final", "RMS" if final_rms else kind)
    return shapes


def make_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that no generator of random numbers has a part in."""
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes_of(config).items())):
        steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
        wave = torch.sin(steps * (0.7 + 0.01 * i) + i)
        state[name] = ((1 + 0.3 * wave) if name.endswith(".w") else 0.4 * wave).reshape(shape).float()
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_compute_what_they_compute_there(tmp_path: Path, name: str) -> None:
    config = {**BASE, **VARIANTS[name]}
    # A constant of the activation and a mask, as they stand in such files.
    buffers = {"blocks.0.attn.mask": torch.ones(12, 12).bool(), "blocks.0.mlp.act_fn.beta": torch.tensor(0.5)}
    state = make_state({**config, "d_mlp": config["d_mlp"] or 24})
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({**state, **buffers}, tmp_path / "model_final.pth")
    loaded = HookedCausalLM(read_words(config, where="config"))
    loaded.load_state_dict({**state, **buffers})
    for model in (HookedCausalLM.from_pretrained(tmp_path), loaded):
        with torch.no_grad():
            logits = model(IDS).double()
        found = torch.cat([logits[0, -1, :3], logits.abs().mean()[None]])
        # The numbers are rounded to five places.
        torch.testing.assert_close(found, torch.tensor(NUMBERS[name]).double(), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_are_written_in_the_words_that_they_were_read_from(name: str) -> None:
    config = {**BASE, **VARIANTS[name]}
    cfg = read_words(config, where="config")
    words, unsaid = write_words(cfg)
    assert unsaid == []
    assert read_words(words, where="config") == cfg
    other_words = {"act_fn", "final_rms"}  # Where several words mean one thing.
    changed = {key: words.get(key) for key, value in config.items() if words.get(key) != value}
    assert set(changed) <= other_words, changed


def test_what_no_word_says_is_listed() -> None:
    norm = NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=True)
    scaling = RotaryScaling(kind="linear", factor=4.0)
    cfg = HookedConfig(
        d_model=16, n_layers=2, n_heads=4, d_vocab=31, n_ctx=12, norm=norm, embed_scale=4.0, residual_scale=0.5,
        final_norm=NormConfig(kind="rms", eps=1e-3, bias=False), qkv_bias=False, tied_unembed=True,
        positions=(RotaryPositions(dim=4, scaling=scaling), NoPositions()),
        attn=(PartConfig(kind="attention"), None),
    )  # fmt: skip
    _, unsaid = write_words(cfg)
    assert {one.partition("=")[0] for one in unsaid} == {
        "final_norm", "residual_scale", "positions", "attn",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"positional_embedding_type": "relative_positional_bias"}, "positional_embedding_type is"),
        ({"positional_embedding_type": "alibi", "n_heads": 6}, "no power of two"),
        ({"use_local_attn": True, "window_size": 4, "attn_types": ["global", "sliding", "local"]}, "not 'sliding'"),
        ({"use_local_attn": True, "window_size": 4, "attn_types": ["global"]}, "one for each of 3 layers"),
        ({"use_local_attn": True, "attn_types": ["local"] * 3}, "window_size is missing"),
        ({"use_normalization_before_and_after": True}, "use_normalization_before_and_after is"),
        ({"d_vocab": -1}, "d_vocab is missing"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 5}, "rotary dim is 5"),
        ({"attn_scale": -2.0}, "attn_scale is"),
        ({"act_fn": "solu_ln", "gated_mlp": True}, "gated_mlp=False"),
        ({"load_in_4bit": True}, "load_in_4bit is"),
    ],
)
def test_words_that_describe_nothing_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        read_words({**BASE, **changes}, where="config")
