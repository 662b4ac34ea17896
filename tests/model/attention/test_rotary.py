"""Tests of hooklens.model.attention.rotary against complex numbers and against transformers' tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import CacheError
from hooklens.model.attention.rotary import RotaryTables, rotary_frequencies
from hooklens.model.plan.positions import TokenPlan
from tests.model.networks import CONFIGS, make_model, pad_rows, random_tokens

CPU = torch.device("cpu")


def rotate_by_complex_numbers(heads, positions, rotary):
    half = rotary.dim // 2
    angle = positions[..., None].double() * rotary.base ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angle), -angle if rotary.reverse else angle)[:, :, None]
    turning, still = heads[..., : rotary.dim].double(), heads[..., rotary.dim :]
    first, second = (
        (turning[..., :half], turning[..., half:])
        if rotary.layout == "half"
        else (turning[..., ::2], turning[..., 1::2])
    )
    turned = torch.complex(first, second) * turn
    parts = (turned.real, turned.imag)
    joined = torch.cat(parts, -1) if rotary.layout == "half" else torch.stack(parts, -1).flatten(-2)
    return torch.cat([joined, still], -1)


@settings(max_examples=60)
@given(
    dim=st.sampled_from([2, 4, 8]), layout=st.sampled_from(["half", "interleaved"]), n_new=st.integers(1, 9),
    n_past=st.integers(0, 90), masked=st.booleans(), seed=st.integers(0, 9), reverse=st.booleans(),
)  # fmt: skip
def test_rotation_is_multiplication_by_a_complex_number(dim, layout, n_new, n_past, masked, seed, reverse):
    generator = torch.Generator().manual_seed(seed)
    rotary = RotaryPositions(dim=dim, layout=layout, base=500.0, reverse=reverse)
    mask = torch.rand(2, n_new, generator=generator) < 0.7 if masked else None
    plan = TokenPlan(batch=2, n_new=n_new, n_past=n_past, attention_mask=mask, device=CPU)
    tables = RotaryTables(rotary, 8)
    heads = torch.randn(2, n_new, 3, 8, generator=generator, dtype=torch.float64)
    expected = rotate_by_complex_numbers(heads, plan.positions.expand(2, -1), rotary)
    # Tables are float32: a position of 100 is an angle of 100 radians, good to 100 * 2**-24.
    torch.testing.assert_close(tables.rotate(heads, tables.look_up(plan, torch.float64)), expected, rtol=0, atol=3e-5)


def test_scores_depend_on_distances_only():
    rotary = RotaryPositions(dim=6)
    tables, q, k = RotaryTables(rotary, 6), torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 1, 6).double()

    def score(query, key):
        at = [TokenPlan(batch=1, n_new=1, device=CPU, positions=torch.tensor([[p]])) for p in (query, key)]
        turned = [tables.rotate(x, tables.look_up(plan, torch.float64)) for x, plan in zip((q, k), at, strict=True)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=0, atol=1e-5)


SCALINGS = {
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"factor": 4.0}, {"factor": 4.0, "original_n_ctx": 32}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_n_ctx": 128},
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 32},
        {"factor": 4.0, "original_n_ctx": 32},
    ),
    "yarn, mscale": (
        {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
         "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 4.0, "original_n_ctx": 32, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
         "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn, attention factor": (
        {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
        {"factor": 4.0, "original_n_ctx": 32, "attention_factor": 1.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("n_tokens", [None, 20, 33, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_against_transformers(name, n_tokens):
    theirs, ours = SCALINGS[name]
    kind = name.partition(",")[0]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=32,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **theirs},
    )  # fmt: skip
    expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=n_tokens)
    positions = RotaryPositions(dim=16, scaling=RotaryScaling(kind=kind, **ours))
    found, found_amplitude = rotary_frequencies(positions, n_tokens)
    # Two float32 roundings of the same expression.
    torch.testing.assert_close(found, expected.float(), rtol=3e-7, atol=0)
    assert found_amplitude == pytest.approx(amplitude, abs=1e-12)


def make_dynamic():
    scaling = RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=6)
    return make_model(CONFIGS["grouped"].replace(positions=RotaryPositions(dim=6, scaling=scaling)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_dynamic_rows_turn_by_their_own_length(side):
    """The batch's width decided the frequencies, so a row's numbers depended on its neighbours."""
    model = make_dynamic()
    rows = [random_tokens(1, n, seed=n)[0] for n in (5, 9, 12)]
    ids, mask = pad_rows(rows, side)
    batched = model(ids, attention_mask=mask)
    for row, tokens in enumerate(rows):
        # 1e-10: other shapes, other order of float64 sums.
        torch.testing.assert_close(batched[row][mask[row].bool()], model(tokens)[0], rtol=1e-10, atol=1e-10)


def test_dynamic_past_the_original_length_refuses_a_cache():
    model, tokens = make_dynamic(), random_tokens(1, 9)
    cache = model.prefill(tokens[:, :4])
    model(tokens[:, 4:6], past_kv_cache=cache)
    with pytest.raises(CacheError, match=r"past 6 tokens the frequencies depend on .* the 4 cached keys do not fit a"):
        model(tokens[:, 4:], past_kv_cache=cache)


def test_tables_grow_and_serve_autograd_after_inference_mode():
    """A table first made under inference_mode could not be used in a forward with gradients."""
    model, tokens = make_model("rotary"), random_tokens(1, 8)
    with torch.inference_mode():
        expected = model(tokens)
    model(tokens).sum().backward()
    assert torch.equal(model(tokens), expected)
    long = model(random_tokens(1, 30))
    assert torch.equal(make_model("rotary")(random_tokens(1, 30)), long)


@pytest.mark.parametrize(("layout", "pairs"), [("half", [0, 1, 2, 0, 1, 2]), ("interleaved", [0, 0, 1, 1, 2, 2])])
def test_waves_are_those_of_each_entrys_angle(layout, pairs):
    cos, sin = RotaryTables(RotaryPositions(dim=6, base=100.0, layout=layout), 8).waves(5, CPU, torch.float64)
    angles = torch.arange(5.0)[:, None] * torch.tensor([100.0 ** (-pair / 3) for pair in pairs])
    torch.testing.assert_close(cos.float(), angles.cos())
    torch.testing.assert_close(sin.float(), angles.sin())
