"""Options of attention against the attention of transformers' models that have them, every parameter random.

Each network is one attention without norms, so what it adds to the stream is what transformers' module returns.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    GptOssConfig,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    Ministral3Config,
    OlmoeConfig,
    Phi3Config,
    XGLMConfig,
)
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1Attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import Ministral3Attention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

from hooklens.config import (
    HookedConfig,
    NoPositions,
    NormConfig,
    QueryTemperature,
    RotaryPositions,
    RotaryScaling,
    SinusoidalPositions,
)
from hooklens.model.attention.rotary import rotary_tables
from hooklens.model.plan.positions import TokenPlan
from tests.model.networks import make_model, random_tokens

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
N = 11
ROTARY = RotaryPositions(dim=6)
RMS = NormConfig(kind="rms", eps=1e-5, bias=False)
# transformers rotates, norms and weighs in float32; sums of two dozen numbers up to 4.
BOUND = 1e-5


def build_plain_rotary(config: Any) -> Tensor | tuple[Tensor, Tensor]:
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(N)[None])


CASES: dict[str, tuple[Any, Callable[[Any], nn.Module], Callable[[Any], Any], dict[str, Any]]] = {
    "norm over all heads, then clipped": (
        OlmoeConfig(**SIZES, clip_qkv=1.1, attn_implementation="eager"),
        lambda config: OlmoeAttention(config, 0),
        build_plain_rotary,
        {"qk_norm": RMS, "qk_norm_over": "all_heads", "clip_qkv": 1.1, "positions": ROTARY, "qkv_bias": False},
    ),
    "norm with a weight per head": (
        CohereConfig(**SIZES, use_qk_norm=True, attn_implementation="eager"),
        lambda config: CohereAttention(config, 0),
        lambda config: CohereRotaryEmbedding(config)(torch.zeros(1), torch.arange(N)[None]),
        {
            "qk_norm": NormConfig(kind="layer", eps=1e-5, bias=False),
            "qk_norm_per_head": True,
            "positions": RotaryPositions(dim=6, layout="interleaved", base=500000.0),
            "qkv_bias": False,
        },
    ),
    "norm after rotary": (
        HunYuanDenseV1Config(**SIZES, head_dim=6, attn_implementation="eager"),
        lambda config: HunYuanDenseV1Attention(config, 0),
        build_plain_rotary,
        {"qk_norm": RMS, "qk_norm_after_rotary": True, "positions": ROTARY, "qkv_bias": False},
    ),
    "sinks": (
        GptOssConfig(
            **SIZES,
            head_dim=6,
            attention_bias=True,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        lambda config: GptOssAttention(config, 0),
        lambda config: GptOssRotaryEmbedding(config)(torch.zeros(1), torch.arange(N)[None]),
        {"attn_sinks": True, "positions": ROTARY},
    ),
    "temperature": (
        Ministral3Config(
            **SIZES,
            head_dim=6,
            attn_implementation="eager",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.4,
                "original_max_position_embeddings": 3,
            },
        ),
        lambda config: Ministral3Attention(config, 0),
        build_plain_rotary,
        {"query_temperature": QueryTemperature(scale=0.4, length=3), "positions": ROTARY, "qkv_bias": False},
    ),
    "temperature where there is no rotary": (
        Llama4TextConfig(
            **SIZES, head_dim=6, no_rope_layers=[0], attn_scale=0.3, floor_scale=4, attn_implementation="eager"
        ),
        lambda config: Llama4TextAttention(config, 0),
        lambda config: None,
        {
            "query_temperature": QueryTemperature(scale=0.3, length=4, offset=1),
            "positions": NoPositions(),
            "qkv_bias": False,
        },
    ),
    "norm without weight after interleaved rotary": (
        Llama4TextConfig(**SIZES, head_dim=6, no_rope_layers=[1], use_qk_norm=True, attn_implementation="eager"),
        lambda config: Llama4TextAttention(config, 0),
        lambda config: Llama4TextRotaryEmbedding(config)(torch.zeros(1), torch.arange(N)[None]),
        {
            "qk_norm": NormConfig(kind="rms", eps=1e-5, weight=False, bias=False),
            "qk_norm_after_rotary": True,
            "positions": RotaryPositions(dim=6, layout="interleaved", base=500000.0),
            "qkv_bias": False,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_is_that_of_transformers(case: str) -> None:
    config, build, build_rotary, options = CASES[case]
    theirs = build(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    model = make_model(
        HookedConfig(
            d_model=24, n_layers=1, n_heads=4, n_kv_heads=2, d_vocab=7, n_ctx=32, attn_only=True, norm=None,
            **{"out_bias": options.get("qkv_bias", True), **options},
        ),
        dtype=torch.float32,
    )  # fmt: skip
    copy_weights(theirs, model.block_list()[0].attn)
    x = torch.randn(2, N, 24, generator=generator)
    mask = torch.full((N, N), -torch.inf).triu(1)[None, None]

    expected, pattern = theirs(
        hidden_states=x,
        position_embeddings=build_rotary(config),
        attention_mask=mask,
        position_ids=torch.arange(N)[None],
    )
    _, cache = model.run_with_cache(x, start_at_layer=0, stop_at_layer=1)

    assert (cache["attn_out", 0] - expected).abs().max() < BOUND * expected.abs().max()
    assert (cache["pattern", 0] - pattern).abs().max() < BOUND


def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Maps, the weights of norms (flat ones by head), and sinks."""
    norms = {"query_layernorm": "q_norm", "key_layernorm": "k_norm", "q_norm": "q_norm", "k_norm": "k_norm"}
    for name, parameter in theirs.named_parameters():
        module, _, word = name.rpartition(".")
        if module in norms:
            weight = getattr(ours, norms[module]).w
            weight.copy_(parameter.view(weight.shape))
        elif module:
            getattr(getattr(ours, module), word).copy_(parameter)
        else:
            getattr(ours, name).copy_(parameter)


@pytest.mark.parametrize("length", [24, 25, 40])
def test_longrope_turns_as_in_transformers(length: int) -> None:
    factors = {"short_factor": [1.0, 1.25, 1.5], "long_factor": [1.5, 3.0, 6.0]}
    config = Phi3Config(
        hidden_size=24,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=96,
        original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24, **factors,
        },
    )  # fmt: skip
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    scaling = RotaryScaling(
        kind="longrope",
        factor=4.0,
        original_n_ctx=24,
        short_factors=tuple(factors["short_factor"]),
        long_factors=tuple(factors["long_factor"]),
    )

    tables = rotary_tables(RotaryPositions(dim=6, scaling=scaling), 6)
    plan = TokenPlan(batch=1, n_new=length, device=torch.device("cpu"))
    our_cos, our_sin = tables.look_up(plan, torch.float32)

    # A float32 angle of up to 40 is off by half a unit in its last place, 2e-6.
    assert (our_cos[:, :, 0] - cos).abs().max() < 4e-6
    assert (our_sin[:, :, 0, 3:] - sin[..., 3:]).abs().max() < 4e-6


def test_sinusoidal_positions_are_those_of_transformers() -> None:
    config = XGLMConfig(d_model=24, max_position_embeddings=32)
    table = XGLMSinusoidalPositionalEmbedding(32, 24, padding_idx=config.pad_token_id)
    positions = SinusoidalPositions(layout="half", includes_base=True, offset=table.offset)
    model = make_model(
        HookedConfig(d_model=24, n_layers=1, n_heads=4, d_vocab=7, n_ctx=32, positions=positions), dtype=torch.float32
    )

    _, cache = model.run_with_cache(random_tokens(2, 20, d_vocab=7))

    expected = table(position_ids=torch.arange(20)[None])
    assert (cache["hook_pos_embed"] - expected).abs().max() < 4e-6


def test_sinusoidal_positions_are_those_of_the_paper() -> None:
    """Vaswani et al. 2017, section 3.5, one number after another."""
    cfg = HookedConfig(d_model=6, n_layers=1, n_heads=2, d_vocab=7, n_ctx=64, positions=SinusoidalPositions(base=50.0))
    model = make_model(cfg)

    _, cache = model.run_with_cache(random_tokens(1, 9, d_vocab=7))

    for position in range(9):
        for i in range(3):
            angle = torch.tensor(position / 50.0 ** (2 * i / 6), dtype=torch.float64)
            pair = cache["hook_pos_embed"][0, position, 2 * i : 2 * i + 2]
            # Angles are float32 numbers.
            assert (pair - torch.stack([angle.sin(), angle.cos()])).abs().max() < 2e-6
