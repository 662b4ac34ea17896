from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.adapters.keys import ConfigReader, LayeredRotary, PositionKeys, WindowKeys, all_but_every
from hooklens.config import NoPositions, RotaryPositions, RotaryScaling

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {"n_layers": 4, "d_head": 8, "n_heads": 2, "d_model": 16}
TWO = LayeredRotary(
    windows=WindowKeys(default=64, slides=all_but_every(3, "period"), slides_keys=("period",)),
    rotary=PositionKeys(default_base=1e6),
    local_base=("local", 100.0),
)


def read(part: LayeredRotary, config: dict) -> dict:
    reader = ConfigReader(config)
    fields = part.read(reader, SIZES)
    assert not reader.problems
    assert not reader.unused()
    return fields


@st.composite
def rotations(draw) -> RotaryPositions:
    scalings = [
        None,
        RotaryScaling(kind="linear", factor=4.0),
        RotaryScaling(kind="yarn", factor=2.0, original_n_ctx=9),
    ]
    return RotaryPositions(dim=8, base=draw(st.sampled_from([50.0, 1e4])), scaling=draw(st.sampled_from(scalings)))


@settings(max_examples=60)
@given(rotations(), rotations(), st.lists(st.booleans(), min_size=4, max_size=4))
def test_two_rotations_are_written_and_read_back(full, sliding, slides) -> None:
    """Both are in the config, also where layers of one kind only are there."""
    by_layer = tuple(sliding if one else full for one in slides)
    positions = by_layer[0] if len(set(by_layer)) == 1 else by_layer
    windows = tuple(5 if one else None for one in slides) if any(slides) else None
    fields = {"windows": windows, "positions": positions, "n_ctx": 128}
    written = TWO.write({**SIZES, **fields})
    assert set(written["rope_parameters"]) == {FULL, SLIDING}
    assert read(TWO, written) == fields


def test_a_scaling_of_both_kinds_makes_the_context_longer_once() -> None:
    """Each kind's rotation began from the context that the one before it had made longer."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0}
    config = {"max_position_embeddings": 16, "rope_parameters": {FULL: rope, SLIDING: rope}}
    mixed = read(TWO, {**config, "rope_parameters": {FULL: {"rope_theta": 9.0}, SLIDING: rope}})
    assert mixed["n_ctx"] == 64
    assert read(TWO, TWO.write({**SIZES, **mixed})) == mixed
    fields = read(TWO, config)
    assert fields["n_ctx"] == 64
    assert fields["positions"].scaling == RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=16)
    assert read(TWO, TWO.write({**SIZES, **fields})) == fields


def test_kinds_take_the_defaults_of_their_own() -> None:
    """An object without a base took the other kind's default."""
    bases = {
        "silent": ({}, [100, 100, 1e6, 100]),
        "flat": ({"rope_theta": 7.0, "local": 8.0}, [8, 8, 7, 8]),
        "empty objects": ({"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {}}}, [100, 100, 1e6, 100]),
        "one object": ({"rope_parameters": {SLIDING: {"rope_theta": 9.0}}, "rope_theta": 7.0}, [9, 9, 7, 9]),
    }
    for name, (config, expected) in bases.items():
        assert [one.base for one in read(TWO, config)["positions"]] == expected, name


def test_layers_without_rotation() -> None:
    part = LayeredRotary(
        windows=WindowKeys(key="size"),
        rotary=PositionKeys(),
        unrotated=lambda reader, kinds, size: [kind == FULL for kind in kinds],
    )
    fields = read(part, {"size": 3, "layer_types": [SLIDING, FULL, SLIDING, SLIDING]})
    assert fields["windows"] == (3, None, 3, 3)
    assert [isinstance(one, NoPositions) for one in fields["positions"]] == [False, True, False, False]
    assert read(part, part.write({**SIZES, **fields})) == fields
