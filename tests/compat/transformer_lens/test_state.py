"""Fresh weights are those that TransformerLens 2.18 draws from the same seed."""

from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.compat.transformer_lens._state import draw_weights
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from tests.torch_version import draws_bfloat16_anew

BASE: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "d_head": 8, "n_heads": 4, "n_ctx": 12, "d_vocab": 31, "d_mlp": 24,
    "act_fn": "gelu", "device": "cpu", "seed": 3,
}  # fmt: skip
MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP")
CHANGES: dict[str, dict[str, Any]] = {
    **{mode: {"init_mode": mode} for mode in MODES},
    "gated": {
        "gated_mlp": True, "act_fn": "silu", "n_key_value_heads": 2, "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
    },
    "alibi": {"positional_embedding_type": "alibi"},
    "moe": {"num_experts": 3, "experts_per_token": 2, "act_fn": "silu"},
    "attn only": {"attn_only": True, "seed": None, "d_vocab_out": 5},
    "bf16": {"dtype": torch.bfloat16},
    "f64": {"dtype": torch.float64},
}  # fmt: skip
# Three entries of W_U, and the sum of the second layer's W_O: what is drawn last but one, and last.
NUMBERS = {
    "gpt2": [0.09294, -0.00323, 0.21041, 8.06444],
    "xavier_uniform": [0.13101, -0.15997, 0.05961, -1.83138],
    "xavier_normal": [0.09586, -0.00334, 0.21702, 6.72037],
    "kaiming_uniform": [0.22455, -0.27417, 0.10216, -5.49415],
    "kaiming_normal": [0.1643, -0.00572, 0.37195, 20.1611],
    "muP": [0.46471, -0.01617, 1.05203, 14.25605],
    "gated": [0.32407, 0.11524, 0.22894, 3.16396],
    "alibi": [0.09294, -0.00323, 0.21041, 8.06444],
    "moe": [0.27767, 0.18366, -0.02227, -0.03855],
    "attn only": [0.22474, -0.02831, -0.08417, 3.05126],
    "bf16": [0.09277, -0.00323, 0.20996, 8.06342],
    "f64": [0.10457, -0.01178, -0.15357, 1.90377],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=draws_bfloat16_anew if name == "bf16" else ()) for name in CHANGES]
)
def test_numbers_are_those_of_the_same_seed_there(name: str) -> None:
    torch.manual_seed(11)
    cfg = HookedTransformerConfig(**{**BASE, **CHANGES[name]})
    with torch.random.fork_rng(devices=[]):
        model = HookedCausalLM(cfg.to_hooked_config()).to(cfg.dtype)
    draw_weights(model, cfg)
    found = [*model.W_U[0, :3].double().tolist(), model.blocks[1].attn.W_O.double().sum().item()]
    assert found == pytest.approx(NUMBERS[name], abs=1e-5)
    assert not model.blocks[0].attn.b_Q.any()
