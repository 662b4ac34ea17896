import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.adapters.keys import ConfigReader
from hooklens.adapters.keys.positions import FixedPositionKeys, PositionKeys, rotary_dim_keys
from hooklens.config import AlibiPositions, LearnedPositions, RotaryPositions, RotaryScaling

WHOLE = PositionKeys(alibi="alibi")
PART = PositionKeys(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25)


@st.composite
def scalings(draw) -> tuple[RotaryScaling | None, int]:
    kind = draw(st.sampled_from([None, "linear", "dynamic", "llama3", "yarn"]))
    factor, original, n_ctx = draw(st.floats(1, 32)), draw(st.integers(1, 512)), draw(st.integers(1, 4096))
    if kind is None:
        return None, n_ctx
    if kind == "linear":
        return RotaryScaling(kind=kind, factor=factor), n_ctx
    if kind == "dynamic":
        return RotaryScaling(kind=kind, factor=factor, original_n_ctx=original), int(factor * original)
    if kind == "llama3":
        low, high = draw(st.floats(0.5, 2)), draw(st.floats(3, 8))
        scaling = RotaryScaling(
            kind=kind, factor=factor, original_n_ctx=original, low_freq_factor=low, high_freq_factor=high
        )
        return scaling, n_ctx
    scaling = RotaryScaling(
        kind=kind,
        factor=factor,
        original_n_ctx=original,
        beta_fast=draw(st.floats(8, 64)),
        beta_slow=draw(st.floats(0.5, 4)),
        attention_factor=draw(st.none() | st.floats(0, 2)),
        mscale=draw(st.none() | st.floats(0.1, 2)),
        mscale_all_dim=draw(st.none() | st.floats(0.1, 2)),
        truncate=draw(st.booleans()),
    )
    return scaling, n_ctx


@given(st.integers(1, 64), st.data(), scalings(), st.floats(1, 1e7))
def test_every_rotary_reads_back_as_written(half_head, data, scaling_and_length, base) -> None:
    """Also the fraction of a head: int(d_head * fraction) must give the rotated entries again."""
    scaling, n_ctx = scaling_and_length
    d_head = 2 * half_head
    dim = 2 * data.draw(st.integers(1, half_head))
    fields = {"n_ctx": n_ctx, "d_head": d_head, "positions": RotaryPositions(dim=dim, base=base, scaling=scaling)}
    reader = ConfigReader(PART.write(fields))
    assert PART.read(reader, {"d_head": d_head}) == {"n_ctx": n_ctx, "positions": fields["positions"]}
    assert not reader.problems
    assert not reader.unused()


@pytest.mark.parametrize("alibi", [True, False])
def test_alibi_flag(alibi) -> None:
    read = WHOLE.read(ConfigReader({"alibi": alibi, "rope_theta": 5.0}), {"d_model": 32, "n_heads": 4})
    expected = AlibiPositions(scaled=True, bfloat16=True) if alibi else RotaryPositions(dim=8, base=5.0)
    assert read == {"n_ctx": 2048, "positions": expected}
    assert WHOLE.write({**read, "d_head": 8})["alibi"] is alibi


def test_partial_rotation_is_refused_where_the_family_has_none() -> None:
    reader = ConfigReader({"rope_parameters": {"partial_rotary_factor": 0.5}})
    WHOLE.read(reader, {"d_model": 32, "n_heads": 4})
    assert reader.problems == [
        "rope_parameters.partial_rotary_factor is 0.5; expected 1.0, since this family rotates whole heads"
    ]


@pytest.mark.parametrize(("kind", "missing"), [("linear", "factor"), ("llama3", "high_freq_factor")])
def test_a_missing_scaling_parameter_is_named(kind, missing) -> None:
    parameters = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del parameters[missing]
    reader = ConfigReader({"rope_parameters": parameters})
    WHOLE.read(reader, {"d_model": 32, "n_heads": 4})
    assert reader.problems == [f"rope_parameters.{missing} is missing"]


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    config = {
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16},
    }
    positions = WHOLE.read(ConfigReader(config), {"d_model": 32, "n_heads": 4})["positions"]
    assert positions.scaling == RotaryScaling(kind="yarn", factor=4.0, original_n_ctx=16)


@pytest.mark.parametrize(
    ("config", "n_ctx"), [({}, 64), ({"n_positions": 8}, 8), ({"n_positions": 8, "max_position_embeddings": 5}, 5)]
)
def test_fixed_positions_have_a_length_in_two_spellings(config, n_ctx) -> None:
    part = FixedPositionKeys(
        positions=LearnedPositions(), n_ctx="n_positions", alias="max_position_embeddings", default_n_ctx=64
    )
    reader = ConfigReader(config)
    read = part.read(reader, {})
    assert read == {"n_ctx": n_ctx, "positions": LearnedPositions()}
    assert not reader.unused()
    assert part.write(read) == {"n_positions": n_ctx}


def test_a_rotation_of_which_only_the_width_is_said() -> None:
    part = rotary_dim_keys(n_ctx="n_positions", alias="max_position_embeddings")
    read = part.read(ConfigReader({"rotary_dim": 6, "n_positions": 8}), {})
    assert read == {"n_ctx": 8, "positions": RotaryPositions(dim=6, layout="interleaved")}
    assert part.write(read) == {"rotary_dim": 6, "n_positions": 8}
    reader = ConfigReader({})
    assert part.read(reader, {}) == {}
    assert reader.problems == ["rotary_dim is missing"]


@pytest.mark.parametrize(
    ("config", "base", "is_stretched"),
    [
        ({}, 5.0, True),
        ({"rope_theta": 777.0}, 5.0, True),
        ({"rope_theta": 777.0, "rope_scaling": None}, 5.0, True),
        ({"rope_theta": 777.0, "rope_scaling": {"rope_type": "default"}}, 777.0, False),
        ({"rope_parameters": {}}, 10000.0, False),
    ],
)
def test_family_s_own_rotation_holds_where_the_config_describes_none(config, base, is_stretched) -> None:
    """transformers fills the object in before it looks at the flat base, so its entries rank before that.

    A flat base alone switched the family's own rotation off, stretch and all.
    """
    part = PositionKeys(default_rope={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0})
    positions = part.read(ConfigReader(config), {"d_head": 8})["positions"]
    assert positions.base == base
    assert (positions.scaling is not None) is is_stretched


def test_flat_base_ranks_before_the_family_s_where_its_own_rotation_has_none() -> None:
    part = PositionKeys(default_rope={"rope_type": "linear", "factor": 2.0}, default_base=5.0)
    for config, base in (({}, 5.0), ({"rope_theta": 777.0}, 777.0)):
        positions = part.read(ConfigReader(config), {"d_head": 8})["positions"]
        assert positions.base == base
        assert positions.scaling is not None
