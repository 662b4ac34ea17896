"""Activations, norms, frequencies and slopes against PyTorch's and transformers'."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from hooklens.config import AlibiPositions, NormConfig, RotaryPositions, RotaryScaling
from hooklens.verification.explicit.activations import activate, centre, denominator
from hooklens.verification.explicit.batch import Batch
from hooklens.verification.explicit.positions import _amplitude, _frequency, alibi_term

X = torch.linspace(-4, 4, 41, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", F.relu(X)),
        ("relu2", F.relu(X) ** 2),
        ("gelu", F.gelu(X)),
        ("gelu_tanh", F.gelu(X, approximate="tanh")),
        ("gelu_quick", X * torch.sigmoid(1.702 * X)),
        ("silu", F.silu(X)),
    ],
)
def test_activations(name, expected) -> None:
    torch.testing.assert_close(activate(X, name), expected)


def test_norms() -> None:
    layer, rms = NormConfig(kind="layer", eps=1e-2), NormConfig(kind="rms", eps=1e-2, bias=False)
    torch.testing.assert_close(centre(X, layer) / denominator(X, layer), F.layer_norm(X, (41,), eps=1e-2))
    torch.testing.assert_close(centre(X, rms) / denominator(X, rms), F.rms_norm(X, (41,), eps=1e-2))


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (RotaryScaling(kind="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
        (RotaryScaling(kind="dynamic", factor=3.0, original_n_ctx=64), {"rope_type": "dynamic", "factor": 3.0}),
        (
            RotaryScaling(kind="llama3", factor=8.0, original_n_ctx=64, low_freq_factor=1.0, high_freq_factor=4.0),
            {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
        ),
        (
            RotaryScaling(kind="yarn", factor=4.0, original_n_ctx=64),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(scaling, parameters) -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 500.0, **parameters},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device=torch.device("cpu"), seq_len=100)
    positions = RotaryPositions(dim=16, base=500.0, scaling=scaling)
    found = torch.tensor([_frequency(positions, pair, 100) for pair in range(8)])

    torch.testing.assert_close(found, expected)
    assert _amplitude(scaling) == pytest.approx(factor)


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_slopes_are_those_of_transformers(n_heads) -> None:
    mask = torch.ones(1, 5, dtype=torch.bool)
    expected = build_alibi_tensor(mask, n_heads, torch.float32)[:, 0]
    batch = Batch(tokens=mask.long(), mask=mask)

    found = alibi_term(AlibiPositions(bfloat16=True), n_heads, batch, 1.0, torch.float32)[0]

    torch.testing.assert_close(found.float(), expected, atol=0, rtol=0)


def test_positions_count_tokens_and_a_window_counts_positions() -> None:
    mask = torch.tensor([[False, True, True, False, True]])
    batch = Batch(tokens=mask.long(), mask=mask)

    assert batch.positions().tolist() == [[0, 0, 1, 0, 2]]
    assert batch.lengths() == [3]
    assert batch.visible(None)[0].tolist() == [
        [False] * 5,
        [False, True, False, False, False],
        [False, True, True, False, False],
        [False, True, True, False, False],
        [False, True, True, False, True],
    ]
    assert batch.visible(2)[0, 4].tolist() == [False, False, True, False, True]
